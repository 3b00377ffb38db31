"""Writes README.md's table of what is supported from tests/engine/support_matrix.py.

support_matrix.py [--check]      with --check: changes nothing, exit code 1 if the table is out of date
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "engine"))
from support_matrix import ROWS  # noqa: E402

BLOCK = re.compile(r"(<!-- support -->\n).*?(<!-- end of support -->)", re.S)


def missing_tests(names: list[str], tests: Path) -> list[str]:
    """Those of the names, file::function, that no file has."""
    functions: dict[str, set[str]] = {}
    missing = []
    for name in names:
        file, _, function = name.partition("::")
        if file not in functions:
            path = tests / file
            body = ast.parse(path.read_text()).body if path.is_file() else []
            functions[file] = {node.name for node in body if isinstance(node, ast.FunctionDef)}
        if not function.startswith("test_") or function not in functions[file]:
            missing.append(name)
    return missing


def table() -> str:
    lines = ["| what | proved on | tests |", "|---|---|---|"]
    for row in ROWS:
        files: dict[str, list[str]] = {}
        for name in row.tests:
            file, _, function = name.partition("::")
            files.setdefault(file, []).append(function.removeprefix("test_").replace("_", " "))
        tests = "; ".join(f"[{Path(file).name}](tests/{file}): {', '.join(found)}" for file, found in files.items())
        lines.append(f"| {row.what} | {row.how} | {tests} |")
    return "\n".join(lines) + "\n"


def rewritten(page: str) -> str:
    """The page with its table replaced. Raises ValueError if the markers are not there once, or a test is not there."""
    if missing := missing_tests([name for row in ROWS for name in row.tests], ROOT / "tests"):
        raise ValueError(f"tests/engine/support_matrix.py names tests that do not exist: {', '.join(missing)}")
    new, count = BLOCK.subn(lambda match: f"{match[1]}{table()}{match[2]}", page)
    if count != 1:
        raise ValueError(f"the page has {count} blocks between the markers of the support table; it must have one")
    return new


def main() -> int:
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = rewritten(old)
    if sys.argv[1:] == ["--check"]:
        if new != old:
            print("README.md: its support table is out of date; run ci/support_matrix.py", file=sys.stderr)
        return int(new != old)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
