"""ci/check_lanes.py passes on this tree and catches each idiom of 32 lanes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("check_lanes", ROOT / "ci" / "check_lanes.py")
check_lanes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_lanes)


def test_this_tree_assumes_nothing():
    assert check_lanes.check(ROOT) == []


def test_the_bodies_are_looked_at():
    names = {path.name for pattern in check_lanes.SOURCES for path in ROOT.glob(pattern)}
    assert {"store.cuh", "attend.cuh", "dequant.cuh", "row_lanes.cuh", "launch.cc"} <= names


@pytest.mark.parametrize(
    "line",
    [
        "const int lane = threadIdx.x % 32;",
        "const int warp = threadIdx.x / 32;",
        "const int lane = threadIdx.x & 31;",
        "const int warp = threadIdx.x >> 5;",
        "x = __shfl_xor_sync(mask, x, 1);",
        "const unsigned all = 0xFFFFFFFFu;",
        "const int size = warpSize;",
        "constexpr int kVectors = 32 / kLanes;",
        "const auto votes = __ballot(x > 0);",
    ],
)
def test_an_idiom_is_caught(tmp_path: Path, line: str):
    (tmp_path / "csrc/kernels/gpu").mkdir(parents=True)
    (tmp_path / "csrc/kernels/gpu/a.cuh").write_text(f"// of 32 lanes\n{line}\n")
    problems = check_lanes.check(tmp_path)
    assert problems and all(p.startswith("csrc/kernels/gpu/a.cuh:2: ") for p in problems)


@pytest.mark.parametrize(
    "line", ["uint32_t x = 0;", "if (slot >> 32 == 0) {", "d.dtype == Dtype::kF32;", "w & 0x33333333u;", "x % kWave;"]
)
def test_other_numbers_pass(tmp_path: Path, line: str):
    (tmp_path / "hip").mkdir(parents=True)
    (tmp_path / "hip/a.cc").write_text(f"{line}  /* 32 */\n")
    assert check_lanes.check(tmp_path) == []
