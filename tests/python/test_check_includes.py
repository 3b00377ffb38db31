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
]


@pytest.mark.parametrize(("name", "text", "complaint"), VIOLATIONS, ids=[f"{n}-{c}" for n, _, c in VIOLATIONS])
def test_a_violation_is_caught(tmp_path: Path, name: str, text: str, complaint: str):
    root = tree(tmp_path, {"csrc/abi/loader.h": "", "csrc/kernels/cpu/tasks.h": "", name: text})
    problems = check_includes.check(root)
    assert len(problems) == 1, problems
    assert problems[0].startswith(name)
    assert complaint in problems[0]


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
            "plugin/tq_backend/register.py": "def register():\n    import vllm\n",
            "plugin/tq_backend/vllm_adapter/impl.py": "import torch\nimport vllm\n",
        },
    )
    assert check_includes.check(root) == []
