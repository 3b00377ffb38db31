"""Writes the figures of README.md and docs/figures.md from tests/bench/results/*.json, so that none is typed by hand.

readme_figures.py [--check]      with --check: changes nothing, exit code 1 if one of the two is out of date

docs/figures.md has all of them; README.md those of files with few.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- figures -->\n).*?(<!-- end of figures -->)", re.S)
FEW = 30  # figures of a file that README.md quotes
FIELDS = ("figure", "value", "unit", "bar", "baseline", "machine", "date", "command")


def cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")


def table(file: Path) -> str:
    """One results file as a table under the command that wrote it. Raises ValueError for an entry of another form."""
    rows = json.loads(file.read_text())
    for row in rows:
        if set(row) != set(FIELDS):
            raise ValueError(f"{file.name}: an entry has the keys {sorted(row)}; it must have {sorted(FIELDS)}")
    lines = []
    for command, machine, date in dict.fromkeys((row["command"], row["machine"], row["date"]) for row in rows):
        lines += [
            "",
            f"`{command}` on {machine}, {date}:",
            "",
            "| figure | value | to reach | against |",
            "|---|---|---|---|",
        ]
        for row in rows:
            if (row["command"], row["machine"], row["date"]) == (command, machine, date):
                unit = "" if row["unit"] == "1" else f" {row['unit']}"
                lines.append(
                    f"| {cell(row['figure'])} | {cell(row['value'])}{unit} | {cell(row['bar'])} | {cell(row['baseline'])} |"
                )
    return "\n".join(lines[1:])


def rewritten(readme: str, results: Path, at_most: int = FEW) -> str:
    """A text with its figures replaced. Raises ValueError if the markers are not there once."""
    tables = [table(file) for file in sorted(results.glob("*.json")) if len(json.loads(file.read_text())) <= at_most]
    text = "\n\n".join(tables) or "Not measured yet."
    new, count = BLOCK.subn(lambda match: f"{match[1]}{text}\n{match[2]}", readme)
    if count != 1:
        raise ValueError(f"the text has {count} blocks of figures between the markers; it must have one")
    return new


def main() -> int:
    stale = []
    for name, at_most in (("README.md", FEW), ("docs/figures.md", sys.maxsize)):
        path = ROOT / name
        old = path.read_text()
        new = rewritten(old, ROOT / "tests" / "bench" / "results", at_most)
        if new != old:
            stale.append(name)
            if sys.argv[1:] != ["--check"]:
                path.write_text(new)
    if sys.argv[1:] == ["--check"] and stale:
        print(f"{', '.join(stale)}: out of date with tests/bench/results; run ci/readme_figures.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
