"""ci/check_hip.py finds what is wrong with a code object: here of made-up ones, ctest HipBundle runs it on the real bundle."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("check_hip", ROOT / "ci" / "check_hip.py")
check_hip = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_hip)

CLEAN = {
    "wavefront_size": 64,
    "vgpr_spill_count": 0,
    "sgpr_spill_count": 0,
    "private_segment_fixed_size": 0,
    "vgpr_count": 100,
    "group_segment_fixed_size": 1024,
}
CODE = "v_perm_b32 v0, v1, v2\n v_dot4_u32_u8 v0\n ds_bpermute_b32 v0\n v_mfma_f32_16x16x16_f16 a[0:3]\n"


def problems(name: str | None = None, code: str = CODE, **numbers: int) -> list[str]:
    """Of a code object for gfx942 that is as it should be, but for these numbers and this code of one kernel."""
    kernels = {kernel: dict(CLEAN) for kernel in check_hip.KERNELS}
    codes = dict.fromkeys(kernels, CODE)
    if name is not None:
        kernels[name].update(numbers)
        codes[name] = code
    return check_hip.check_target("gfx942", kernels, codes)


def test_what_is_as_it_should_be_passes():
    assert problems() == []
    assert len(check_hip.KERNELS) == 91


@pytest.mark.parametrize(
    ("name", "numbers", "words"),
    [
        ("tq_merge", {"wavefront_size": 32}, "waves of 32 lanes, not 64"),
        ("tq_attend_k3v3_512", {"vgpr_spill_count": 3}, "vgpr_spill_count is 3"),
        ("tq_attend_k3v3_512", {"private_segment_fixed_size": 16}, "private_segment_fixed_size is 16"),
        ("tq_attend_k4v4_128", {"sgpr_spill_count": 1}, "sgpr_spill_count is 1"),
    ],
)
def test_a_number_is_caught(name: str, numbers: dict[str, int], words: str):
    (problem,) = problems(name, **numbers)
    assert problem == f"gfx942 {name}: {words}"


def test_scalar_spills_of_large_heads_are_reported_only():
    assert problems("tq_attend_k3v3_512", sgpr_spill_count=9) == []
    kernels = {"tq_attend_k3v3_512": CLEAN | {"sgpr_spill_count": 9}}
    assert "tq_attend_k3v3_512 9" in check_hip.report("gfx942", kernels)


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("tq_attend_k8v4_64", "v_mfma_f32_16x16x16_?f16"),
        ("tq_attend_k4v4_64", "v_perm_b32"),
        ("tq_store_k3v4_8", "v_dot4_u32_u8"),
        ("tq_rotate_16", "ds_bpermute_b32"),
    ],
)
def test_a_missing_instruction_is_caught(name: str, instruction: str):
    line = next(part for part in CODE.splitlines() if instruction.split("_?", maxsplit=1)[0] in part)
    (problem,) = problems(name, CODE.replace(line, ""))
    assert problem == f"gfx942 {name}: no {instruction}"


def test_a_missing_kernel_is_caught():
    kernels = {kernel: dict(CLEAN) for kernel in check_hip.KERNELS - {"tq_merge"}}
    assert check_hip.check_target("gfx942", kernels, dict.fromkeys(kernels, CODE)) == ["gfx942: there is no tq_merge"]


def test_notes_are_read():
    notes = (
        "amdhsa.kernels:\n  - .agpr_count:     0\n    .args:\n      - .offset:         0\n        .size:           8\n"
        "    .name:           tq_merge\n    .sgpr_spill_count: 2\n    .wavefront_size: 64\n"
        "  - .agpr_count:     4\n    .name:           tq_copy_pages\n    .wavefront_size: 32\n"
    )
    found = check_hip.metadata(notes)
    assert found["tq_merge"]["wavefront_size"] == 64 and found["tq_merge"]["sgpr_spill_count"] == 2
    assert found["tq_copy_pages"]["wavefront_size"] == 32
