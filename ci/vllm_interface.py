"""Writes docs/vllm_interface.md from the adapter's table of what it touches of vLLM.

vllm_interface.py [--check]      with --check: changes nothing, exit code 1 if the page is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

# The installed package (ci/setup.sh): one in the source tree has no libraries, and a test that imports this file hands its
# sys.path to the engines that it starts.
from tq_backend.vllm_adapter.interface import NEEDS, Kind, Without

ROOT = Path(__file__).resolve().parent.parent

PAGE = ROOT / "docs" / "vllm_interface.md"
HEAD = """# What the adapter touches of vLLM

Written by `ci/vllm_interface.py` from [interface.py](../plugin/tq_backend/vllm_adapter/interface.py), which asks the installed
vLLM for each of these names when an engine with a `turboquant_*` cache makes its configuration. Nothing is asked in an engine without
one. [test_interface.py](../tests/engine/test_interface.py) takes every name away, one at a time, from vLLM 0.32 and from the Python of
0.33, and checks what the headings promise; it also checks that the adapter imports, overrides and reads nothing else of vLLM's
modules, classes and configurations.
"""
HOW = {
    Kind.MEMBER: "an attribute or field",
    Kind.PARAMETER: "a parameter, given by name",
    Kind.BEGINS: "the first parameters, given by position",
    Kind.USES: "an attribute that its body uses",
}


def page() -> str:
    parts = [HEAD]
    for without in Without:
        parts.append(
            f"\n## Without one of these: {without.value}\n\n| of | names | asked as | needed |\n|---|---|---|---|\n"
        )
        for need in NEEDS:
            if need.without is without:
                of = " or ".join(f"`{x.rstrip(':').replace(':', '.')}`" for x in need.of.split("|"))
                names = ", ".join(f"`{name}`" for name in need.names)
                parts.append(f"| {of} | {names} | {HOW[need.kind]} | {need.why} |\n")
    return "".join(parts)


def main() -> int:
    if sys.argv[1:] == ["--check"]:
        current = PAGE.is_file() and PAGE.read_text() == page()
        if not current:
            print("docs/vllm_interface.md is out of date; run ci/vllm_interface.py", file=sys.stderr)
        return int(not current)
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
