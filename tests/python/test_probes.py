"""What the vLLM adapter asks before it serves: the kernel library of the platform, and that a probe that breaks is a sentence. The
engine is a stand-in: only its platform is asked."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
from tq_backend.vllm_adapter import probes

ROWS = [
    {"kind": "cpu", "usable": True, "reason": "fine"},
    {"kind": "cuda", "usable": False, "reason": "no NVIDIA driver"},
    {"kind": "hip", "usable": False, "reason": "no /dev/kfd"},
]


@pytest.mark.parametrize(
    ("cpu", "rocm", "want"),
    [
        (True, False, ""),
        (False, False, "the cuda kernels are not usable: no NVIDIA driver"),
        (False, True, "the hip kernels are not usable: no /dev/kfd"),
    ],
)
def test_the_platform_decides(monkeypatch: pytest.MonkeyPatch, cpu: bool, rocm: bool, want: str):
    platforms = ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: cpu, is_rocm=lambda: rocm)
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setattr(probes, "native", lambda: SimpleNamespace(libraries=lambda: ROWS))
    assert probes._kernels() == want


def test_a_probe_that_breaks_is_a_reason(monkeypatch: pytest.MonkeyPatch):
    def broken() -> str:
        raise AttributeError("module 'vllm' has no attribute 'x'")

    monkeypatch.setattr(probes, "PROBES", {"fine": lambda: "", "broken": broken, "unmet": lambda: "no kernels"})
    assert probes.unmet() == ["AttributeError: module 'vllm' has no attribute 'x'", "no kernels"]
