"""`tq`: eval (quality), bench (speed), plan (memory)."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "eval": ("quality", "compare the formats with a bf16 cache on held-out text, in a real vLLM on the CPU"),
    "bench": ("bench", "time CPU decode attention against vLLM's stock kernel"),
    "plan": ("plan", "how many tokens fit in a given memory"),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tq", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    given = sys.argv[1:] if argv is None else argv
    for name, (module, text) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        if given[:1] == [name]:  # the others' imports (torch, vLLM) are not needed
            loaded = importlib.import_module(f"tq_backend.cli.{module}")
            loaded.add_arguments(sub)
            sub.set_defaults(run=loaded.run)
    args = parser.parse_args(given)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
