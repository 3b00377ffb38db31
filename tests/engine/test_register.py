"""The entry points and the platform: what they choose, when they decline, and that an engine never runs something else silently."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from engines import MODEL
from tq_backend.names import BACKEND_PATH, CPU_PLATFORM_PATH
from tq_backend.register import cpu_platform, register
from tq_backend.vllm_adapter import serving
from tq_backend.vllm_adapter.options import Options, read_options


def test_register_can_be_called_again_and_initialises_no_gpu():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    AttentionBackendEnum.TURBOQUANT.clear_override()
    for _ in range(2):
        register()
        assert AttentionBackendEnum.TURBOQUANT.get_path().startswith("vllm."), (
            "only an engine that asks puts our class there"
        )
    for _ in range(2):
        assert serving.not_ours() == ""
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
            "this vLLM's AttentionBackend has no customize_spec",
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
TRY = """
def attempt(name, make):
    try:
        make()
        print(name, "made")
    except ValueError as error:
        print(name, "refused:", " ".join(str(error).split()))

strict, ours = {{"turboquant": {{"strict": True}}}}, "turboquant_4bit_nc"
for name, dtype, options in (("stock", "auto", strict), ("plain", ours, {{}}), ("strict", ours, strict)):
    attempt(name, lambda: {make})
"""
MAKE = f"""
from vllm.engine.arg_utils import EngineArgs
flags = {{{{"model": {str(MODEL)!r}, "skip_tokenizer_init": True}}}}
{TRY}
""".format(make="EngineArgs(**flags, kv_cache_dtype=dtype, additional_config=options).create_engine_config()")
COMPLETE = f"""
from vllm.config import VllmConfig, CacheConfig
{TRY}
""".format(make="VllmConfig(cache_config=CacheConfig(cache_dtype=dtype), additional_config=options)")
NO_ADAPTER = "sys.modules['tq_backend.vllm_adapter'] = None"
NO_GROUPS = "from tq_backend.vllm_adapter.patches import planning_module; del planning_module().get_kv_cache_groups"
NO_METHOD = "from vllm.engine.arg_utils import EngineArgs; del EngineArgs.create_engine_config"


@pytest.mark.parametrize(
    ("before", "after", "reason", "plain"),
    [
        # The adapter cannot be imported at all. A plain engine fails later, where its layers choose a backend.
        (NO_ADAPTER, MAKE, "import of tq_backend.vllm_adapter", "made"),
        # A wrap cannot be made. On a CPU, where nothing else serves such a cache, a plain engine does not start either.
        (NO_GROUPS, MAKE, "get_kv_cache_groups", "refused"),
        # Who asks cannot be seen.
        (NO_METHOD, COMPLETE, "create_engine_config", "made"),
    ],
    ids=["adapter", "grouping", "configuration"],
)
def test_strict_holds_where_the_adapter_breaks(before, after, reason, plain):
    done = in_a_new_process(STRICT.format(before=before, after=after))
    said = done.stdout + done.stderr
    found = {
        line.split()[0]: line for line in done.stdout.splitlines() if line.startswith(("stock", "plain", "strict"))
    }
    assert found.keys() == {"stock", "plain", "strict"}, said
    assert found["stock"] == "stock made" and found["plain"].startswith(f"plain {plain}"), said
    assert "tq-backend, strict: " in found["strict"] and reason in found["strict"], said
    assert "tq-backend declines" in said, said


def test_strict_holds_where_the_cache_dtype_cannot_be_read(monkeypatch):
    """Then the engine may be one that asks."""
    from tq_backend import register as module

    monkeypatch.setattr(module, "_failed", "a reason")
    strict = {"turboquant": {"strict": True}}
    with pytest.raises(ValueError, match="tq-backend, strict: a reason"):
        module.strict_or_not(SimpleNamespace(additional_config=strict, cache_config=SimpleNamespace()))
    module.strict_or_not(SimpleNamespace(additional_config={}, cache_config=SimpleNamespace()))
    module.strict_or_not(SimpleNamespace(additional_config=strict, cache_config=SimpleNamespace(cache_dtype="auto")))


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


def test_head_dimensions_are_the_librarys():
    from tq_backend.vllm_adapter.backend import TurboQuantBackend as Backend

    served = [dim for dim in range(-32, 2000) if Backend.supports_head_size(dim)]
    assert served == list(range(16, 513, 16))
    assert not Backend.supports_head_size(2**31 + 64)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"turboquant": {"skip_layer": []}}, "did you mean 'skip_layers'"),
        ({"turboquant": {"skip_layers": "0,1"}}, "must be a list"),
        ({"turboquant": {"skip_layers": [1.5]}}, "must be a list"),
        ({"turboquant": {"skip_layers": [True]}}, "must be a list"),
        ({"turboquant": {"strict": 1}}, "must be true or false"),
        (
            {"turboquant": {"sliding_window": 0}},
            "'sliding_window'.* is 0; it must be a number of tokens from 1 to 2147483647",
        ),
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
