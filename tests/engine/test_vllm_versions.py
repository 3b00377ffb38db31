"""What an engine's Python shows without its kernels: registration, spec customisation, page sizes, selection, refusals, the page plan.
Of the installed vLLM, and of 0.33, which has no CPU build to install: ci/setup.sh puts its Python files beside the environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OTHER = Path(os.environ.get("TQ_VLLM") or Path(sys.prefix) / "opt" / "vllm-0.33.0")
VERSIONS = ["0.32", "0.33"]
# What runs on either engine's Python. Real engines need its kernels too.
SHARED = (
    "engine/test_register.py",
    "engine/test_engine_config.py",
    "engine/test_interface.py",
    "engine/test_page_plan.py",
    "python/test_plan_engine.py",
)

# A wheel for GPUs finds no platform here, and its CUDA platform opens kernels that do not load; choosing calls none of them.
ASK = """
import inspect, json, sys, types
sys.modules["vllm._C_stable_libtorch"] = types.ModuleType("vllm._C_stable_libtorch")
import torch, vllm
from vllm.platforms.cuda import CudaPlatform
from vllm.platforms.interface import DeviceCapability
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode
from tq_backend.register import register
from tq_backend.vllm_adapter import patches, probes

probes.PROBES["kernel library of this platform"] = lambda: ""
register()
# As in a worker on a GPU: the first that is seen of an engine is its configuration, when a layer chooses its backend.
CudaPlatform.get_device_capability = classmethod(lambda cls, *_: DeviceCapability(9, 0))
patches.wrap(CudaPlatform, "get_attn_backend_cls", patches.selected_backend, classmethod)

def choose(run, layer):
    cache = types.SimpleNamespace(cache_dtype=run)
    vllm.config.get_current_vllm_config_or_none = lambda: types.SimpleNamespace(cache_config=cache)
    return CudaPlatform.get_attn_backend_cls(None, AttentionSelectorConfig(128, torch.bfloat16, layer, None))

stock = choose("auto", "auto")
stock_loaded = [name for name in sys.modules if name.startswith("tq_backend.") and name.endswith((".backend", "_native"))]
chosen = {layer: choose("turboquant_4bit_nc", layer) for layer in ("auto", "turboquant_4bit_nc")}
from tq_backend.vllm_adapter import formats
backend = AttentionBackendEnum.TURBOQUANT.get_class()
from vllm.v1.attention.backends.turboquant_attn import TurboQuantAttentionBackend as InTree

def page(cls, dtype, dim):
    spec = FullAttentionSpec(
        block_size=16, num_kv_heads=2, head_size=dim, dtype=torch.uint8, kv_quant_mode=get_kv_quant_mode(dtype)
    )
    return cls.customize_spec(cls.customize_spec(spec)).page_size_bytes

print("answer", json.dumps({
    "version": vllm.__version__,
    "unmet": probes.unmet(),
    "path": AttentionBackendEnum.TURBOQUANT.get_path(),
    "wrapped": hasattr(EngineArgs.create_engine_config, patches.MARK),
    "abstract": sorted(backend.get_impl_cls().__abstractmethods__ | backend.get_builder_cls().__abstractmethods__),
    "pages": {f"{d} {n}": [page(c, d, n) for c in (backend, InTree)] for d in formats.CACHE_DTYPES for n in (64, 128, 256, 512)},
    "chosen": chosen,
    "stock": stock,
    "stock_loaded": stock_loaded,
}))
"""

# Bytes of one token and head, by head_dim.
SLOTS = {
    "turboquant_k8v4": {64: 100, 128: 196, 256: 388, 512: 772},
    "turboquant_4bit_nc": {64: 70, 128: 134, 256: 262, 512: 518},
    "turboquant_k3v4_nc": {64: 62, 128: 118, 256: 230, 512: 454},
    "turboquant_3bit_nc": {64: 54, 128: 102, 256: 198, 512: 390},
}


def run(version: str, *command: str) -> subprocess.CompletedProcess:
    """Python with that vLLM in front. Fails where it is missing: a skip would go unnoticed."""
    path = [os.environ.get("PYTHONPATH", "")]
    if version != VERSIONS[0]:
        assert (OTHER / "vllm").is_dir(), (
            f"no vLLM in {OTHER}: run TQ_BUILD_TESTS=ON bash ci/setup.sh, or name one in TQ_VLLM"
        )
        path = [str(OTHER), *path]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, env=env, cwd=ROOT)


def test_the_other_vllm_passes_what_needs_no_engine():
    files = [f"tests/{name}" for name in SHARED]
    done = run(VERSIONS[1], "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not engine_reports", *files)
    print(done.stdout[-3000:] + done.stderr[-1000:])
    assert done.returncode == 0


@pytest.mark.parametrize("version", VERSIONS)
def test_registration_page_sizes_and_selection(version):
    done = run(version, "-c", ASK)
    lines = [line for line in done.stdout.splitlines() if line.startswith("answer ")]
    assert lines, done.stdout + done.stderr
    answer = json.loads(lines[0].removeprefix("answer "))
    assert answer["version"].startswith(version)
    assert answer["unmet"] == [] and answer["abstract"] == []
    assert answer["path"] == "tq_backend.vllm_adapter.backend.TurboQuantBackend"
    assert answer["wrapped"]
    want = {f"{d} {n}": [16 * 2 * slot] * 2 for d, slots in SLOTS.items() for n, slot in slots.items()}
    assert answer["pages"] == want
    assert answer["chosen"].pop("turboquant_4bit_nc") == answer["path"]
    assert answer["chosen"] == {"auto": answer["stock"]}
    assert answer["stock"] == "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"
    # TURBOQUANT is a candidate for every layer on CUDA; in an engine that does not ask it is not our class that is asked.
    assert answer["stock_loaded"] == []
