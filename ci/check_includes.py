"""The layering of both halves: who may include or import whom. Arrows go one way; anything else fails.

check_includes.py [ROOT]
"""

from __future__ import annotations

import ast
import graphlib
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
# The Python half, lowest first: a module imports those of its own layer and of the layers before it, wherever in the file it does,
# and none in a circle. Entry points and commands are on top, so the adapter cannot import them; a module that is named nowhere
# is shared by the adapter and the commands.
PYTHON_LAYERS = (
    ("tq_backend.names",),
    ("tq_backend", "tq_backend._library", "tq_backend._native"),
    (),  # shared
    ("tq_backend.vllm_adapter",),
    ("tq_backend.register",),
    ("tq_backend.cli",),
)
SHARED = PYTHON_LAYERS.index(())
IMPORT = re.compile(r"^\s*(?:from|import)\s+(\w+)", re.M)
TOP_IMPORT = re.compile(r"^(?:from|import)\s+(\w+)", re.M)
WITHOUT_TORCH = tuple(f"plugin/tq_backend/{name}.py" for name in ("__init__", "_library", "names", "register"))
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
    if name in WITHOUT_TORCH:
        problems += [f"{name} imports {m} at its top; the package must import without it"
                     for m in TOP_IMPORT.findall(text) if m in ("torch", "vllm", "numpy")]  # fmt: skip
    return problems


def layer_of(module: str) -> int:
    """The package's own __init__ is named exactly; a folder stands for all of its modules."""
    for level, names in enumerate(PYTHON_LAYERS):
        if any(module == name or (name.count(".") > 0 and module.startswith(f"{name}.")) for name in names):
            return level
    return SHARED


def imported(tree: ast.Module, modules: set[str]) -> set[str]:
    """Of the package's modules, those that a file imports: at its top, in a function or for its types alone."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # `from package import name`: a module of that name, or what the package's own file defines
            found |= {
                inner if (inner := f"{node.module}.{alias.name}") in modules else node.module for alias in node.names
            }
    return found & modules


def check_python_layers(root: Path) -> list[str]:
    plugin, problems = root / "plugin", []
    files = {
        ".".join(file.relative_to(plugin).with_suffix("").parts).removesuffix(".__init__"): file
        for file in sorted(plugin.rglob("*.py"))
    }
    graph = {}
    for module, file in files.items():
        tree = ast.parse(file.read_text())
        name = file.relative_to(root).as_posix()
        if any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree)):
            problems.append(f"{name} has a relative import; the layering reads whole names")
        graph[module] = imported(tree, set(files)) - {module}
        problems += [
            f"{name} imports {other}, which lies above it"
            for other in sorted(graph[module])
            if layer_of(other) > layer_of(module)
        ]
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        problems.append(f"plugin: these import each other in a circle: {' <- '.join(error.args[1])}")
    return problems


def check(root: Path) -> list[str]:
    problems = []
    for folder in ("csrc", "hip"):
        for file in sorted((root / folder).rglob("*")):
            if file.suffix in (".h", ".cc", ".cu", ".cuh", ".inc", ".hip"):
                problems += check_cpp(root, file)
    for file in sorted((root / "plugin").rglob("*.py")):
        problems += check_python(root, file)
    return problems + check_python_layers(root)


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    problems = check(root)
    print("\n".join(problems) if problems else "includes: as layered")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
