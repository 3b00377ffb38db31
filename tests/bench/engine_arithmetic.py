"""vLLM's own count of blocks and KV tokens, from specs built of numbers: no model, no weights, no GPU.

Two ways to the specs: from a plan of ours (what the adapter has to make the engine see), and as the engine builds them itself
around the in-tree TurboQuant backend. The arithmetic behind is in both cases the engine's get_kv_cache_configs and
get_kv_cache_capacity.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from tq_backend import model_layers
from tq_backend.vllm_adapter import page_plan, patches
from tq_backend.vllm_adapter.backend import TurboQuantBackend
from vllm.model_executor.layers.attention.attention import Attention
from vllm.model_executor.models import ModelRegistry
from vllm.platforms.interface import Platform
from vllm.v1.attention.backend import AttentionType, MultipleOf
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout, MambaSpec, SlidingWindowSpec, get_kv_quant_mode
from vllm.v1.worker.utils import customize_attention_spec

try:  # vLLM 0.33 groups layers first, in a module of their own
    from vllm.v1.core.kv_cache_planning import get_global_kv_cache_groups, get_kv_cache_configs

    def planned(config: Any, specs: dict[str, Any]) -> Any:
        return get_kv_cache_configs(config, [specs], [config.memory], get_global_kv_cache_groups(config, [specs]))[0]

except ImportError:

    def planned(config: Any, specs: dict[str, Any]) -> Any:
        return kv_cache_utils.get_kv_cache_configs(config, [specs], [config.memory])[0]


@dataclass(frozen=True)
class Capacity:
    num_blocks: int
    kv_tokens: int
    num_groups: int
    scheduler_block_size: int  # prefix-cache hits come in multiples of it


class RefusedByEngine(Exception):
    """What get_kv_cache_configs says when a sequence does not fit, or where one of its assertions fails."""


def engine_config(
    memory: int,
    max_model_len: int,
    in_flight_tokens: int,
    layout: KVCacheLayout,
    blocks_per_state: int,
    block_size: int,
) -> Any:
    """As much of a VllmConfig as planning reads."""
    cache = SimpleNamespace(
        block_size=block_size,
        num_gpu_blocks_override=None,
        prefix_cache_retention_interval=None,
        mamba_cache_mode="none" if blocks_per_state == 1 else "align",
        enable_prefix_caching=False,
        prefix_match_unit=None,
        get_resolved_kv_cache_layout=lambda: layout,
        skip_page_size_padded=None,
        mamba_page_size_padded=None,
        mamba_block_size=None,
        cache_dtype="turboquant_4bit_nc",
        kv_cache_dtype_skip_layers=[],
    )
    return SimpleNamespace(
        cache_config=cache,
        model_config=SimpleNamespace(
            max_model_len=max_model_len,
            original_max_model_len=max_model_len,
            supports_kv_cache_grouping=False,
            dtype=torch.bfloat16,
        ),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, tensor_parallel_size=1, pipeline_parallel_size=1
        ),
        additional_config={},
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        kv_transfer_config=None,
        speculative_config=None,
        max_in_flight_tokens=in_flight_tokens,
        num_prefill_lookahead_tokens=0,
        memory=memory,
    )


def capacity(config: Any, specs: dict[str, Any], groups: Callable[..., Any] | None = None) -> Capacity:
    """The engine's answer. Raises RefusedByEngine if it would refuse to start. groups: in place of the engine's own
    get_kv_cache_groups, which is used even where this process has registered the adapter."""
    module = patches.planning_module()
    try:
        with mock.patch.object(module, "get_kv_cache_groups", groups or patches.unwrapped(module.get_kv_cache_groups)):
            found = planned(config, specs)
    except (ValueError, AssertionError) as error:
        where = traceback.extract_tb(error.__traceback__)[-2 if isinstance(error, AssertionError) else -1].name
        raise RefusedByEngine(str(error) or f"{type(error).__name__} in {where}") from error
    scheduler = kv_cache_utils.generate_scheduler_kv_cache_config([found])
    tokens, _ = kv_cache_utils.get_kv_cache_capacity(config, scheduler)
    block_size, _ = kv_cache_utils.resolve_kv_cache_block_sizes(scheduler, config)
    return Capacity(found.num_blocks, tokens, len(found.kv_cache_groups), block_size)


def specs_of_plan(layers: list[dict], plan: dict) -> dict[str, Any]:
    """layers: what plan_pages was given; plan: what it gave."""
    specs: dict[str, Any] = {}
    for i, (layer, row) in enumerate(zip(layers, plan["layers"], strict=True)):
        if layer.get("kv_sharing_target", -1) != -1:
            continue
        padded = row["page_bytes"] if row["padding_bytes"] else None
        if layer.get("state_bytes"):
            specs[f"layers.{i}"] = MambaSpec(
                block_size=row["block_size"],
                shapes=((layer["state_bytes"],),),
                dtypes=(torch.uint8,),
                page_size_padded=padded,
            )
            continue
        native = layer.get("format") is None
        common = dict(
            block_size=row["block_size"],
            num_kv_heads=layer["num_kv_heads"],
            head_size=layer["head_dim"],
            head_size_v=layer.get("head_dim_v") or layer["head_dim"],
            dtype={1: torch.uint8, 2: torch.bfloat16, 4: torch.float32}[layer["native_bytes"]]
            if native
            else torch.uint8,
            page_size_padded=padded,
        )
        if not native:
            common |= {
                "kv_quant_mode": get_kv_quant_mode(layer["format"]),
                "state_content_bytes": (row["page_bytes"] - row["padding_bytes"])
                // (row["block_size"] * layer["num_kv_heads"]),
            }
        window = layer.get("sliding_window")
        specs[f"layers.{i}"] = (
            SlidingWindowSpec(**common, sliding_window=window) if window else FullAttentionSpec(**common)
        )
    return specs


def capacity_of_plan(
    layers: list[dict], plan: dict, memory: int, max_model_len: int, in_flight_tokens: int, blocks_per_state: int = 1
) -> Capacity:
    """What the engine counts when its specs are those of a plan of ours."""
    layout = KVCacheLayout.BLHNC if plan["strategy"] == "side_by_side" else KVCacheLayout.LBHNC
    sizes = [row["block_size"] for row in plan["layers"]]
    config = engine_config(memory, max_model_len, in_flight_tokens, layout, blocks_per_state, sizes[0])
    return capacity(config, specs_of_plan(layers, plan))


class NativeBackend:
    """A native GPU backend as far as planning asks it: any multiple of 16 tokens, pages as they are."""

    @staticmethod
    def customize_spec(spec: Any) -> Any:
        return spec

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[MultipleOf]:
        return [MultipleOf(16)]

    @staticmethod
    def is_mla() -> bool:
        return False


def in_tree_capacity(
    config: dict, format_name: str, memory: int, *, tp: int, max_model_len: int, in_flight_tokens: int
) -> Capacity:
    """What the engine counts for its own TurboQuant, or for "auto" and "fp8": block sizes and paddings of its platform code,
    specs of its Attention layer. Layers that the in-tree class refuses (windows) keep the native cache, as
    `--kv-cache-dtype-skip-layers sliding_window` makes them; that it then may fail at run time is not asked here."""
    from vllm.v1.attention.backends.turboquant_attn import TurboQuantAttentionBackend

    text = model_layers.text_config(config)
    layers = [layer for layer in model_layers.cache_layers(config, tp) if layer.kv_sharing_target == -1]
    turbo = format_name.startswith("turboquant_")
    hybrid = any(layer.state_bytes for layer in layers)
    count = text["num_hidden_layers"]
    boundary = {0, 1, count - 2, count - 1} if turbo and not hybrid else set()
    native_dtype = getattr(torch, text["dtype"])

    def is_packed(layer: model_layers.CacheLayer) -> bool:
        return turbo and layer.number not in boundary and not layer.sliding_window

    attention = [layer for layer in layers if not layer.state_bytes]
    vllm_config = engine_config(memory, max_model_len, in_flight_tokens, KVCacheLayout.LBNHC, 1, 16)
    cache = vllm_config.cache_config
    cache.cache_dtype = format_name
    cache.kv_cache_dtype_skip_layers = [str(i) for i in sorted(boundary)]
    if turbo and any(layer.sliding_window for layer in attention):
        cache.kv_cache_dtype_skip_layers.append("sliding_window")
    # The representative layer of a model of several geometries is its first one.
    vars(vllm_config.model_config).update(
        dtype=native_dtype,
        use_mla=False,
        architecture="",
        get_head_size=lambda: attention[0].head_dim,
        get_num_kv_heads=lambda _: attention[0].num_kv_heads,
    )
    first = TurboQuantAttentionBackend if is_packed(attention[0]) else NativeBackend
    backends = [first, *({TurboQuantAttentionBackend, NativeBackend} - {first} if turbo and not hybrid else ())]
    with (
        mock.patch.object(Platform, "_find_non_ssm_backends", lambda _: backends),
        mock.patch.object(ModelRegistry, "resolve_model_cls", lambda *_, **__: (StateShapes(layers), "")),
    ):
        if hybrid:
            Platform._align_hybrid_block_size(vllm_config, first)
        if cache.kv_cache_dtype_skip_layers:
            align = Platform._align_heterogeneous_kv_block_size
            patches.unwrapped(align.__func__)(Platform, vllm_config, first)

    return capacity(vllm_config, engines_specs(vllm_config, layers, format_name, is_packed, TurboQuantAttentionBackend))


def engines_specs(
    vllm_config: Any,
    layers: list[model_layers.CacheLayer],
    format_name: str,
    is_packed: Callable[[model_layers.CacheLayer], bool],
    packed_backend: Any,
) -> dict[str, Any]:
    """What vLLM's Attention and Mamba layers and its runner make of the layers that own a cache."""
    specs: dict[str, Any] = {}
    for layer in layers:
        if layer.state_bytes:
            specs[str(layer.number)] = MambaSpec(
                block_size=vllm_config.model_config.max_model_len,
                shapes=((layer.state_bytes,),),
                dtypes=(torch.uint8,),
                page_size_padded=vllm_config.cache_config.mamba_page_size_padded,
            )
            continue
        packed = is_packed(layer)
        backend = packed_backend if packed else NativeBackend
        module = SimpleNamespace(
            attn_type=AttentionType.DECODER,
            kv_cache_dtype=format_name if packed or format_name == "fp8" else "auto",
            sliding_window=layer.sliding_window or None,
            attn_backend=backend,
            num_kv_heads=layer.num_kv_heads,
            head_size=layer.head_dim,
            head_size_v=layer.head_dim,
            kv_cache_torch_dtype=torch.uint8 if packed or format_name == "fp8" else vllm_config.model_config.dtype,
        )
        specs[str(layer.number)] = customize_attention_spec(backend, Attention.get_kv_cache_spec(module, vllm_config))
    return specs


def adapted_capacity(
    config: dict, format_name: str, memory: int, *, tp: int, max_model_len: int, in_flight_tokens: int
) -> Capacity:
    """What the engine counts with our backend and the adapter's page plan, from specs that it makes itself."""
    skipped = model_layers.skip_layers(config, format_name)
    layers = [layer for layer in model_layers.cache_layers(config, tp) if layer.kv_sharing_target == -1]
    vllm_config = engine_config(memory, max_model_len, in_flight_tokens, KVCacheLayout.LBHNC, 1, 16)
    vllm_config.cache_config.user_specified_block_size = False
    vllm_config.model_config.dtype = getattr(torch, model_layers.text_config(config)["dtype"])
    specs = engines_specs(
        vllm_config, layers, format_name, lambda layer: layer.number not in skipped, TurboQuantBackend
    )
    own = patches.unwrapped(patches.planning_module().get_kv_cache_groups)
    return capacity(vllm_config, specs, partial(page_plan.grouped, own))


class StateShapes:
    """A model class as far as _align_hybrid_block_size asks it."""

    def __init__(self, layers: list[model_layers.CacheLayer]) -> None:
        self.bytes = max((layer.state_bytes for layer in layers), default=0)

    def get_mamba_state_shape_from_config(self, _: Any) -> tuple:
        return ((self.bytes,),)

    def get_mamba_state_dtype_from_config(self, _: Any) -> tuple:
        return (torch.uint8,)
