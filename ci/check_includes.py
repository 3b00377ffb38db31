"""The include layering: who may include or import whom. Arrows go one way; anything else fails.

check_includes.py [ROOT]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

# Folder -> folders of this repository whose headers its files may include (besides its own).
ALLOWED = {
    "csrc/include": (),
    "csrc/codec": (),
    "csrc/layout": ("csrc/codec",),
    "csrc/planner": ("csrc/layout", "csrc/codec"),
    "csrc/kernels": ("csrc/layout", "csrc/codec", "csrc/elf/build_note.h"),
    "hip": ("csrc/kernels", "csrc/layout", "csrc/codec", "csrc/elf/build_note.h"),
    "csrc/elf": (),
    "csrc/bindings": (),
    "csrc/abi": (
        "csrc/include",
        "csrc/planner",
        "csrc/layout",
        "csrc/codec",
        "csrc/elf",
        "csrc/kernels/kernels.h",
        "csrc/kernels/public_numbers.h",
    ),
    "csrc/torch": ("csrc/include", "csrc/bindings"),
    "csrc/python": ("csrc/include", "csrc/bindings"),
    "csrc/check": ("csrc/include", "csrc/elf"),
}
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^">]+)[">]', re.M)
FOREIGN = re.compile(r"^\s*#\s*include\s*[<\"](torch/|pybind11/|Python\.h)", re.M)
FOREIGN_ALLOWED = ("csrc/torch", "csrc/python")
DLOPEN_ALLOWED = ("csrc/abi/loader.cc", "csrc/check/", "csrc/kernels/cuda/driver.cc", "hip/runtime.cc")
INTRINSIC = re.compile(r"\b(_mm\d*_\w+|__builtin_amdgcn_\w+|(__)?asm(__)?\s*((__)?(volatile|inline|goto)(__)?\s*)*\()")
IMPORT = re.compile(r"^\s*(?:from|import)\s+(\w+)", re.M)
TOP_IMPORT = re.compile(r"^(?:from|import)\s+(\w+)", re.M)
VLLM_ALLOWED = ("plugin/tq_backend/vllm_adapter/", "plugin/tq_backend/register.py", "plugin/tq_backend/cli/")


def folder_of(path: str) -> str | None:
    return max((f for f in ALLOWED if path.startswith(f + "/")), key=len, default=None)


def check_cpp(root: Path, file: Path) -> list[str]:
    name = file.relative_to(root).as_posix()
    text = file.read_text()
    problems = []
    folder = folder_of(name)
    for header in INCLUDE.findall(text):
        bases = (file.parent, root / "csrc", root / "csrc/include", root)
        found = next((base / header for base in bases if (base / header).is_file()), None)
        if folder is None or found is None:
            continue  # a system header, or generated
        path = found.resolve().relative_to(root.resolve()).as_posix()
        if folder_of(path) != folder and not path.startswith(ALLOWED[folder]):
            problems.append(
                f'{name} includes "{header}": {folder} may include {", ".join(ALLOWED[folder]) or "nothing"}'
            )
    if FOREIGN.search(text) and folder not in FOREIGN_ALLOWED:
        problems.append(f"{name} includes torch or Python; only {', '.join(FOREIGN_ALLOWED)} may")
    if "dlopen(" in text and not name.startswith(DLOPEN_ALLOWED):
        problems.append(f"{name} calls dlopen; only {', '.join(DLOPEN_ALLOWED)} may")
    if INTRINSIC.search(text) and "/arch/" not in name:
        problems.append(f"{name} has intrinsics or asm; they belong under arch/")
    return problems


def check_python(root: Path, file: Path) -> list[str]:
    name = file.relative_to(root).as_posix()
    text = file.read_text()
    problems = []
    if "vllm" in IMPORT.findall(text) and not name.startswith(VLLM_ALLOWED):
        problems.append(f"{name} imports vllm; only {', '.join(VLLM_ALLOWED)} may")
    if name in ("plugin/tq_backend/__init__.py", "plugin/tq_backend/_library.py", "plugin/tq_backend/register.py"):
        problems += [f"{name} imports {m} at its top; the package must import without it"
                     for m in TOP_IMPORT.findall(text) if m in ("torch", "vllm", "numpy")]  # fmt: skip
    return problems


def check(root: Path) -> list[str]:
    problems = []
    for folder in ("csrc", "hip"):
        for file in sorted((root / folder).rglob("*")):
            if file.suffix in (".h", ".cc", ".cu", ".cuh", ".inc", ".hip"):
                problems += check_cpp(root, file)
    for file in sorted((root / "plugin").rglob("*.py")):
        problems += check_python(root, file)
    return problems


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    problems = check(root)
    print("\n".join(problems) if problems else "includes: as layered")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
