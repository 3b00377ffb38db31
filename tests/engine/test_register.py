"""The entry points and the platform: what they choose, when they decline, and that an engine never runs something else silently."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from engines import MODEL
from tq_backend.register import BACKEND_PATH, CPU_PLATFORM_PATH, cpu_platform, register
from tq_backend.vllm_adapter.options import Options, read_options


def test_register_can_be_called_again_and_initialises_no_gpu():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    for _ in range(2):
        register()
        assert AttentionBackendEnum.TURBOQUANT.get_path() == BACKEND_PATH
    assert AttentionBackendEnum.TURBOQUANT.get_class().get_name() == "TURBOQUANT"
    assert not torch.cuda.is_initialized()


def test_cpu_platform_steps_aside_where_vllm_finds_another(monkeypatch):
    from vllm import platforms

    assert cpu_platform() == CPU_PLATFORM_PATH
    monkeypatch.setitem(platforms.builtin_platform_plugins, "cuda", lambda: "vllm.platforms.cuda.CudaPlatform")
    assert cpu_platform() is None


def in_a_new_process(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | env
    )


ROUTE = """
from types import SimpleNamespace
from tq_backend.register import register
from tq_backend.vllm_adapter.platform import TurboQuantCpuPlatform
{before}
register()
wanted = SimpleNamespace(kv_cache_dtype="turboquant_4bit_nc", use_mla=False, use_sparse=False)
print(TurboQuantCpuPlatform.get_attn_backend_cls(None, wanted))
"""


@pytest.mark.parametrize(
    ("before", "missing", "reason"),
    [
        ("", "kernels", "the cpu kernels are not usable"),
        (
            "from vllm.v1.attention.backend import AttentionBackend; del AttentionBackend.customize_spec",
            "",
            "without AttentionBackend.customize_spec",
        ),
    ],
    ids=["no kernel library", "another engine"],
)
def test_declining_is_said_and_stops_a_compressed_cache(tmp_path, before, missing, reason):
    """Stock vLLM would run its own kernel over the packed bytes without a word; see the platform's comment."""
    env = {"TQ_KERNELS_DIR": str(tmp_path)} if missing else {}
    done = in_a_new_process(ROUTE.format(before=before), **env)
    said = done.stdout + done.stderr
    assert "tq-backend declines" in said and reason in said, said
    assert done.returncode != 0
    assert "RuntimeError: kv_cache_dtype turboquant_4bit_nc needs tq-backend on a CPU" in said


STRICT = """
import sys
{before}
from tq_backend.register import register
register()
register()
{after}
"""
MAKE = """
from vllm.engine.arg_utils import EngineArgs
for options in ({{}}, {{"turboquant": {{"strict": True}}}}):
    config = EngineArgs(
        model={model!r}, kv_cache_dtype="turboquant_4bit_nc", skip_tokenizer_init=True, additional_config=options
    ).create_engine_config()
    print("made with", options)
"""
COMPLETE = """
from types import SimpleNamespace
from vllm.config import VllmConfig, CacheConfig
for options in ({}, {"turboquant": {"strict": True}}):
    VllmConfig(cache_config=CacheConfig(cache_dtype="turboquant_4bit_nc"), additional_config=options)
    print("made with", options)
"""


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        # The adapter cannot be imported at all.
        (
            "sys.modules['tq_backend.vllm_adapter'] = None",
            MAKE.format(model=str(MODEL)),
            "import of tq_backend.vllm_adapter",
        ),
        # The first wrap is made, the second cannot be.
        (
            "from vllm.v1.core import kv_cache_utils as a; del a.get_kv_cache_groups\n"
            "try:\n    from vllm.v1.core import kv_cache_planning as b; del b.get_kv_cache_groups\n"
            "except ImportError: pass",
            MAKE.format(model=str(MODEL)),
            "get_kv_cache_groups",
        ),
        # No wrap can be made where it should be.
        (
            "from vllm.engine.arg_utils import EngineArgs; del EngineArgs.create_engine_config",
            COMPLETE,
            "create_engine_config",
        ),
    ],
    ids=["adapter", "second wrap", "first wrap"],
)
def test_strict_holds_where_the_adapter_breaks(before, after, reason):
    done = in_a_new_process(STRICT.format(before=before, after=after))
    said = done.stdout + done.stderr
    assert done.returncode != 0, said
    assert done.stdout.count("made with") == 1 and "made with {}" in done.stdout, said
    last = said[said.rfind("tq-backend, strict: ") :]
    assert last and reason in last, said


def test_routes_by_cache_dtype():
    from tq_backend.vllm_adapter.platform import TurboQuantCpuPlatform as Platform

    register()

    def route(dtype: str | None, use_mla: bool = False) -> str:
        config = SimpleNamespace(kv_cache_dtype=dtype, use_mla=use_mla, use_sparse=False)
        return Platform.get_attn_backend_cls(None, config)

    assert route("turboquant_k8v4") == BACKEND_PATH
    assert route("auto").endswith("CPUAttentionBackend")
    assert route(None).endswith("CPUAttentionBackend")
    with pytest.raises(NotImplementedError, match="does not serve MLA"):
        route("turboquant_k8v4", use_mla=True)


def test_what_a_gpu_platform_asks_the_backend():
    """The questions of CudaPlatform.get_attn_backend_cls and of the runner that captures graphs."""
    from tq_backend.vllm_adapter.backend import TurboQuantBackend as Backend
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.attention.selector import AttentionSelectorConfig

    def reasons(dtype: str, capability: tuple[int, int], block_size: int | None = None, **more) -> list[str]:
        config = AttentionSelectorConfig(128, torch.bfloat16, dtype, block_size, **more)
        return Backend.validate_configuration(device_capability=DeviceCapability(*capability), **config._asdict())

    for capability in ((7, 5), (8, 0), (9, 0), (12, 1)):
        assert reasons("turboquant_4bit_nc", capability) == []
    assert reasons("turboquant_4bit_nc", (9, 0), 64, has_sink=True, has_sliding_window=True, use_non_causal=True) == []
    assert reasons("turboquant_4bit_nc", (7, 0)) == ["compute capability not supported"]
    assert reasons("turboquant_4bit_nc", (9, 0), 24) == ["block_size not supported"]
    assert reasons("auto", (9, 0)) == ["kv_cache_dtype not supported"]
    assert reasons("turboquant_4bit_nc", (9, 0), use_mla=True) == ["MLA not supported"]
    assert reasons("turboquant_4bit_nc", (9, 0), use_mm_prefix=True) == []
    builder = Backend.get_builder_cls()
    for spans, support in ((False, AttentionCGSupport.ALWAYS), (True, AttentionCGSupport.UNIFORM_BATCH)):
        model = SimpleNamespace(is_mm_prefix_lm=spans)
        assert builder.get_cudagraph_support(SimpleNamespace(model_config=model), None) == support


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"turboquant": {"skip_layer": []}}, "did you mean 'skip_layers'"),
        ({"turboquant": {"skip_layers": "0,1"}}, "must be a list"),
        ({"turboquant": {"skip_layers": [1.5]}}, "must be a list"),
        ({"turboquant": {"skip_layers": [True]}}, "must be a list"),
        ({"turboquant": {"strict": 1}}, "must be true or false"),
        ({"turboquant": {"sliding_window": 0}}, "'sliding_window'.* is 0; it must be a number of tokens, 1 or more"),
        ({"turboquant": {"sliding_window": "64"}}, "'sliding_window'.* is '64'; it must be a number"),
        ({"turboquant": ["skip_layers"]}, "must be a dictionary"),
        ({"turboquant": {"current": "exact"}}, "'current'.* is 'exact'; it must be one of .'raw', 'compressed'"),
    ],
)
def test_options_are_checked(given, words):
    with pytest.raises(ValueError, match=words):
        read_options(given)


def test_options():
    assert read_options({}) == read_options(None) == read_options({"turboquant": {}}) == Options()
    assert read_options({"turboquant": {"skip_layers": []}}).skip_layers == ()
    assert read_options({"turboquant": {"skip_layers": [0, "sliding_window"]}}).skip_layers == ("0", "sliding_window")
