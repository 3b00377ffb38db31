"""ci/check_includes.py passes on this tree and catches each kind of violation of the layering."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("check_includes", ROOT / "ci" / "check_includes.py")
check_includes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_includes)


def test_this_tree_is_layered():
    assert check_includes.check(ROOT) == []


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


# File, its text, and what the complaint must say; csrc/abi/loader.h and csrc/kernels/cpu/tasks.h exist in each tree.
VIOLATIONS = [
    ("csrc/codec/a.cc", '#include "abi/loader.h"\n', "csrc/codec may include nothing"),
    ("csrc/layout/a.h", '  #  include "abi/loader.h"\n', "csrc/layout may include csrc/codec"),
    ("csrc/abi/a.cc", '#include "kernels/cpu/tasks.h"\n', "csrc/kernels/kernels.h"),
    ("csrc/torch/a.cc", '#include "abi/loader.h"\n', "csrc/torch may include csrc/include"),
    ("csrc/abi/a.h", '#include "../kernels/cpu/tasks.h"\n', "csrc/kernels/kernels.h"),
    ("csrc/planner/a.cc", "#include<abi/loader.h>\n", "csrc/planner may include csrc/layout, csrc/codec"),
    ("hip/a.hip", '#include "abi/loader.h"\n', "hip may include csrc/kernels"),
    ("hip/a.cc", 'void* h = dlopen("x.so", 1);\n', "calls dlopen"),
    ("csrc/kernels/gpu/a.cuh", "x = __builtin_amdgcn_perm(a, b, c);\n", "belong under arch/"),
    ("csrc/abi/a.cc", "#include <torch/extension.h>\n", "includes torch or Python"),
    ("csrc/codec/a.cc", '#include "Python.h"\n', "includes torch or Python"),
    ("csrc/planner/a.cc", 'void* h = dlopen("x.so", 1);\n', "calls dlopen"),
    ("csrc/kernels/cpu/a.cc", "auto v = _mm256_set1_ps(1.f);\n", "belong under arch/"),
    ("csrc/kernels/cuda/a.cuh", 'asm volatile("nop;");\n', "belong under arch/"),
    ("csrc/kernels/cuda/a.cu", 'asm("nop;");\n', "belong under arch/"),
    ("csrc/kernels/cuda/a.inc", '__asm__ __volatile__ (\n"nop;");\n', "belong under arch/"),
    ("csrc/kernels/cuda/b.cu", '#include "abi/loader.h"\n', "csrc/kernels may include csrc/layout, csrc/codec"),
    ("csrc/kernels/cuda/b.cuh", '#include "../../abi/loader.h"\n', "csrc/kernels may include csrc/layout, csrc/codec"),
    ("csrc/kernels/cuda/arch/b.inc", '#include "abi/loader.h"\n', "csrc/kernels may include csrc/layout, csrc/codec"),
    ("plugin/tq_backend/_library.py", "def f():\n    import vllm\n", "imports vllm"),
    ("plugin/tq_backend/planner.py", "from vllm.config import x\n", "imports vllm"),
    ("plugin/tq_backend/__init__.py", "import torch\n", "must import without it"),
    ("plugin/tq_backend/register.py", "from vllm.platforms import x\n", "must import without it"),
    ("plugin/tq_backend/names.py", "import numpy\n", "must import without it"),
    (
        "plugin/tq_backend/vllm_adapter/a.py",
        "def f():\n    from tq_backend.cli.plan import x\n",
        "imports tq_backend.cli.plan",
    ),
    ("plugin/tq_backend/vllm_adapter/a.py", "import tq_backend.cli.plan\n", "imports tq_backend.cli.plan"),
    ("plugin/tq_backend/vllm_adapter/a.py", "from tq_backend import register\n", "imports tq_backend.register"),
    (
        "plugin/tq_backend/vllm_adapter/a.py",
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from tq_backend.register import register\n",
        "imports tq_backend.register, which lies above it",
    ),
    ("plugin/tq_backend/register.py", "from tq_backend.cli import plan\n", "imports tq_backend.cli.plan"),
    ("plugin/tq_backend/shared.py", "from tq_backend.vllm_adapter import b\n", "imports tq_backend.vllm_adapter.b"),
    ("plugin/tq_backend/_library.py", "from tq_backend.model import x\n", "imports tq_backend.model, which lies above"),
    ("plugin/tq_backend/names.py", "from tq_backend import __version__\n", "imports tq_backend, which lies above it"),
    ("plugin/tq_backend/cli/a.py", "from . import plan\n", "has a relative import"),
]
# Modules that are there for the imports above.
PLUGIN = (
    "__init__", "names", "_library", "model", "register", "cli/__init__", "cli/plan", "vllm_adapter/__init__",
    "vllm_adapter/b",
)  # fmt: skip


@pytest.mark.parametrize(("name", "text", "complaint"), VIOLATIONS, ids=[f"{n}-{c}" for n, _, c in VIOLATIONS])
def test_a_violation_is_caught(tmp_path: Path, name: str, text: str, complaint: str):
    others = {f"plugin/tq_backend/{module}.py": "" for module in PLUGIN}
    root = tree(tmp_path, {"csrc/abi/loader.h": "", "csrc/kernels/cpu/tasks.h": "", **others, name: text})
    problems = check_includes.check(root)
    assert len(problems) == 1, problems
    assert problems[0].startswith(name)
    assert complaint in problems[0]


def test_a_circle_is_caught(tmp_path: Path):
    """Within one layer, and where one of the imports waits in a function."""
    files = {
        "plugin/tq_backend/vllm_adapter/__init__.py": "",
        "plugin/tq_backend/vllm_adapter/a.py": "from tq_backend.vllm_adapter import b\n",
        "plugin/tq_backend/vllm_adapter/b.py": "import tq_backend.vllm_adapter.c\n",
        "plugin/tq_backend/vllm_adapter/c.py": "def f():\n    from tq_backend.vllm_adapter.a import x\n",
    }
    problems = check_includes.check(tree(tmp_path, files))
    assert len(problems) == 1 and "import each other in a circle" in problems[0], problems
    assert all(f"tq_backend.vllm_adapter.{name}" in problems[0] for name in "abc")


def test_what_the_layering_allows_passes(tmp_path: Path):
    root = tree(
        tmp_path,
        {
            "csrc/codec/format.h": "",
            "csrc/kernels/kernels.h": '#include "codec/format.h"\n#include <vector>\n',
            "csrc/kernels/cpu/arch/a.cc": '#include "kernels/kernels.h"\nauto v = _mm_setzero_ps();\n',
            "csrc/kernels/cuda/arch/mma.cuh": 'asm volatile("nop;");\n',
            "csrc/kernels/cuda/a.cu": '#include "codec/format.h"\n#include "kernels/cuda/arch/mma.cuh"\n#include <cuda_fp16.h>\n',
            "csrc/abi/loader.cc": '#include "kernels/kernels.h"\nvoid* h = dlopen("x.so", 1);\n',
            "csrc/torch/ops.cc": "#include <torch/csrc/stable/tensor.h>\n",
            "plugin/tq_backend/__init__.py": "__version__ = ''\n",
            "plugin/tq_backend/names.py": "import typing\n",
            "plugin/tq_backend/_library.py": "from tq_backend import _native\nfrom tq_backend.names import x\n",
            "plugin/tq_backend/model.py": "from tq_backend._library import native\n",
            "plugin/tq_backend/register.py": "def register():\n    import vllm\n    from tq_backend.vllm_adapter import impl\n",
            "plugin/tq_backend/vllm_adapter/__init__.py": "",
            "plugin/tq_backend/vllm_adapter/impl.py": "import torch\nimport vllm\nfrom tq_backend import model, names\n",
            "plugin/tq_backend/cli/check.py": "from tq_backend import __version__, register\nfrom tq_backend.vllm_adapter import impl\n",
        },
    )
    assert check_includes.check(root) == []
