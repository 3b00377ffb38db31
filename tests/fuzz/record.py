"""record.py SECONDS --json FILE: how many inputs ci/fuzz.sh has run, from the fuzzers' logs in build/fuzz."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from tq_backend.cli.results import Figure, write_results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("seconds", type=int)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    figures = []
    for name, what in (("planner", "the planner"), ("abi", "the functions of the ABI")):
        log = Path("build/fuzz", f"{name}.log").read_text()
        inputs = int(re.search(r"^stat::number_of_executed_units: *(\d+)", log, re.M)[1])
        figures.append(
            Figure(
                f"inputs of {what} in {args.seconds} s, none of which failed",
                inputs,
                "",
                baseline="libFuzzer, ASan and UBSan",
            )
        )
    write_results(args.json, figures, command=f"bash ci/fuzz.sh {args.seconds} --json {args.json.as_posix()}")


if __name__ == "__main__":
    main()
