"""An engine's configuration with a turboquant_* cache: what is refused at start-up, and what of it is set anew.

Both run in the front end, once, when the configuration is complete; workers get the result.
"""

from __future__ import annotations

import logging
from typing import Any

from tq_backend.names import ALTERNATIVE
from tq_backend.vllm_adapter import skip_layers
from tq_backend.vllm_adapter.kv_sharing import aligned_skip_layers
from tq_backend.vllm_adapter.options import Options, check_window

logger = logging.getLogger("vllm.tq_backend")


def platform_refusal(dtype: str) -> str | None:
    """As refusal(), of the platform."""
    from vllm.platforms import current_platform

    if not (current_platform.is_cpu() or current_platform.is_cuda_alike()):
        return f"{dtype} has no kernels for {current_platform.device_name}, only for CPUs, CUDA and ROCm; {ALTERNATIVE}"
    if current_platform.is_cpu():
        from tq_backend.vllm_adapter.platform import TurboQuantCpuPlatform

        if not isinstance(current_platform, TurboQuantCpuPlatform):
            return (
                f"{dtype} needs tq-backend's CPU platform, and {type(current_platform).__name__} is in use, which would run "
                "vLLM's own kernel over compressed pages; add tq_backend_cpu to VLLM_PLUGINS or unset it"
            )
    return None


def model_refusal(model: Any, dtype: str) -> str | None:
    """As refusal(), of the model."""
    if model.use_mla:
        return f"{dtype} does not serve MLA attention, whose cache is not keys and values; {ALTERNATIVE}"
    if model.is_encoder_decoder:
        return f"{dtype} serves decoder attention, and this is an encoder-decoder model; {ALTERNATIVE}"
    if model.attn_type == "encoder_only":
        return (
            f"{dtype} is a cache of keys and values, and this model, whose tokens all see each other, keeps none between steps; "
            "leave --kv-cache-dtype away for it"
        )
    if model.attn_type == "attention_free":
        return f"{dtype} is a cache of keys and values, and no layer of this model has any; leave --kv-cache-dtype away for it"
    return None


def refusal(vllm_config: Any) -> str | None:
    """Why this engine cannot have a turboquant_* cache, in one sentence with the alternative; None if it can."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    dtype = vllm_config.cache_config.cache_dtype
    platform = platform_refusal(dtype)
    if platform is not None:
        return platform
    if (unserved := model_refusal(model, dtype)) is not None:
        return unserved
    for name, size in (
        ("decode_context_parallel_size", parallel.decode_context_parallel_size),
        ("prefill_context_parallel_size", parallel.prefill_context_parallel_size),
    ):
        if size > 1:
            return (
                f"{dtype} keeps all tokens of a KV head on one device, and {name} is {size}; set it to 1 and use "
                "tensor_parallel_size, which splits the cache by KV head"
            )
    heads, ranks = model.get_total_num_kv_heads(), parallel.tensor_parallel_size
    if heads % ranks and ranks % heads:
        return (
            f"{dtype} splits the cache by KV head: {heads} KV heads cannot be divided among tensor_parallel_size {ranks}; "
            f"it must divide {heads} or be a multiple of it"
        )
    return None


def adjust(vllm_config: Any, options: Options, flash_attn_version: int | None) -> None:
    """Changes a complete configuration in place. flash_attn_version: what the user gave, None if nothing.

    vLLM's explicit `--attention-backend TURBOQUANT` asks one class to serve every layer, and on CUDA it raises for the layers that
    keep a native cache. Without it every platform chooses per layer, by cache dtype, and only our class takes turboquant_*.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    attention = vllm_config.attention_config
    # vLLM's own TurboQuant shares an implementation with FlashAttention 2 and forces it on all other layers; ours does not.
    attention.flash_attn_version = flash_attn_version
    if flash_attn_version != 2:  # else vLLM says nothing
        logger.info(
            "tq-backend: vLLM's line \"TurboQuant is not yet compatible with FlashAttention >= 3. Overriding flash_attn_version "
            'to 2" does not hold: %s is in force for the layers with a native cache',
            "vLLM's own choice" if flash_attn_version is None else f"flash_attn_version {flash_attn_version}",
        )
    if attention.backend == AttentionBackendEnum.TURBOQUANT:
        attention.backend = None
        logger.info(
            "tq-backend: attention backends are chosen per layer; layers with a native cache keep the native one"
        )
    cache = vllm_config.cache_config
    chosen = _checked_skip_layers(vllm_config, options)
    cache.kv_cache_dtype_skip_layers = aligned_skip_layers(vllm_config.model_config.hf_text_config, chosen)
    if len(cache.kv_cache_dtype_skip_layers) > len(set(chosen)):
        logger.info(
            "tq-backend: layers %s keep the native cache: they are skipped or share a cache with one that is",
            ", ".join(cache.kv_cache_dtype_skip_layers),
        )
    _set_window(vllm_config, options.sliding_window)
    scheduler = vllm_config.scheduler_config
    if vllm_config.model_config.is_mm_prefix_lm and not scheduler.disable_chunked_mm_input:
        # vLLM does so on GPUs: the tokens of an image see each other in both directions, so no chunk may end inside it.
        scheduler.disable_chunked_mm_input = True
        logger.info("tq-backend: images are prefilled in one piece (--disable-chunked-mm-input)")


def _checked_skip_layers(vllm_config: Any, options: Options) -> list[str]:
    entries, argument = options.skip_layers, "additional_config['turboquant']['skip_layers']"
    if entries is None:  # vLLM's own, and what the user added to them
        entries, argument = vllm_config.cache_config.kv_cache_dtype_skip_layers, "--kv-cache-dtype-skip-layers"
    return skip_layers.checked(entries, skip_layers.num_layers(vllm_config), argument)


def _set_window(vllm_config: Any, window: int | None) -> None:
    """vLLM gives cache_config.sliding_window to each layer that names no window of its own, and sets it from the model's config
    where all layers have one; a config class of other layer types ignores a window of the user's, or refuses it."""
    cache, model = vllm_config.cache_config, vllm_config.model_config
    own = getattr(model.hf_text_config, "sliding_window", None)
    if isinstance(own, int) and own > 0:  # some models write none as 0 or -1
        check_window(own, "sliding_window of the model's config, or of --hf-overrides,")
    if window is not None:
        cache.sliding_window = window
        logger.info("tq-backend: layers without a window of their own attend to the last %d tokens", window)
        return
    overrides = model.hf_overrides if isinstance(model.hf_overrides, dict) else {}
    asked = overrides.get("sliding_window") or (overrides.get("text_config") or {}).get("sliding_window")
    types = getattr(model.hf_text_config, "layer_types", None) or []
    if asked and cache.sliding_window is None and "sliding_attention" not in types:
        logger.warning(
            "tq-backend: hf_overrides sets sliding_window to %s, and no layer of this model takes it from there; set "
            "additional_config['turboquant']['sliding_window']",
            asked,
        )
