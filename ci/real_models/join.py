"""join.py OUT COMMAND PART...      one results file of several models, under the one command that measured them all."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    out, command, *parts = sys.argv[1:]
    rows = [row | {"command": command} for part in parts for row in json.loads(Path(part).read_text())]
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
