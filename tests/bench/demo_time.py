"""How long `bash ci/demo.sh` takes in a fresh clone with nothing cached, how much disk it uses, and how long it takes again.

    python tests/bench/demo_time.py [--json OUT]

System packages are not removed first; without them the first run also installs those (some 20 s).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tq_backend.cli.results import Figure, write_results

ROOT = Path(__file__).resolve().parents[2]
FIRST_BAR, SECOND_BAR, DISK_BAR = 12 * 60, 150, 9.0


def demo(clone: Path) -> float:
    began = time.monotonic()
    subprocess.run(["bash", "ci/demo.sh"], cwd=clone, env=os.environ | {"PIP_NO_CACHE_DIR": "1"}, check=True)
    return time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        first = demo(clone)
        disk = int(
            subprocess.run(["du", "-sk", str(clone)], capture_output=True, text=True, check=True).stdout.split()[0]
        )
        second = demo(clone)
    gigabytes = disk * 1024 / 1e9
    figures = [
        Figure("bash ci/demo.sh in a fresh clone, downloads included", round(first), "s", f"<= {FIRST_BAR}"),
        Figure("disk after it, without pip's cache", round(gigabytes, 2), "GB", f"<= {DISK_BAR:g}"),
        Figure("bash ci/demo.sh again", round(second), "s", f"<= {SECOND_BAR}"),
    ]
    for figure in figures:
        print(f"{figure.figure:55s} {figure.value:8g} {figure.unit} ({figure.bar})")
    if args.json:
        write_results(args.json, figures)
    return 0 if first <= FIRST_BAR and second <= SECOND_BAR and gigabytes <= DISK_BAR else 1


if __name__ == "__main__":
    sys.exit(main())
