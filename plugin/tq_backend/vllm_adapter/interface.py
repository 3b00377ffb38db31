"""Everything of vLLM that the adapter touches, asked of the objects themselves and not of versions: a table, and what is missing.

vLLM renames such things without notice, and a name that is gone must become a sentence: not a traceback in an engine that has
nothing to do with us, and not a wrong result. So each name stands here once, with the reason why it is needed and what happens
without it. docs/vllm_interface.md is this table (ci/vllm_interface.py); tests/engine/test_interface.py takes each name away.
"""

from __future__ import annotations

import enum
import importlib
import inspect
from dataclasses import dataclass
from typing import Any

from tq_backend.names import ALTERNATIVE


class Kind(enum.Enum):
    MEMBER = "has"  # an attribute of a module or class, a field of a dataclass
    PARAMETER = "takes"  # a parameter of a function, given by name
    BEGINS = "begins with"  # the first parameters of a function, given by position
    USES = "uses"  # an attribute that the body of a function reads or sets, where no class declares it


class Without(enum.Enum):
    """What happens in an engine that asks for us. One that does not never gets here."""

    DECLINE = "tq-backend declines: vLLM keeps its own meaning of the flags; an error on a CPU and with `strict`"
    IMAGES = "a model whose images see each other is refused"
    PREFILL = "prefills run by our own kernel, which reads the current chunk from pages; one warning line"
    PAGES = "vLLM plans the page sizes; one warning line"
    NOTICE = "a model on which a format is known to lose accuracy is not named, and the layers that one of ours does not hold are compressed"
    EARLY = "a model that is still to come from a hub has all layers compressed at its first start; a line names it if it matters"
    OFFSET = "no static offset is taken from keys; one warning line"
    PLATFORM = "vLLM's own CPU platform stays, and a compressed cache is refused under it"
    NOTHING = "nothing has to be undone"


@dataclass(frozen=True)
class Need:
    of: str  # module:object, module: for the module itself; alternatives are separated by |
    kind: Kind
    names: tuple[str, ...]
    why: str  # continues "needed ..."
    without: Without = Without.DECLINE


ATTENTION = "vllm.model_executor.layers.attention:Attention"
BACKEND = "vllm.v1.attention.backend:"
SPECS = "vllm.v1.kv_cache_interface:"
CONFIG = "vllm.config:"
LOADER = "vllm.model_executor.model_loader."

NEEDS = (
    # Where an engine that asks is noticed, and where we come in. patches.py has the reasons at length.
    Need(
        "vllm.engine.arg_utils:EngineArgs", Kind.MEMBER, ("create_engine_config", "attention_config"),
        "to check and adjust a configuration where it is made",
    ),
    Need(
        f"{CONFIG}VllmConfig", Kind.MEMBER,
        ("additional_config", "attention_config", "cache_config", "model_config", "parallel_config", "scheduler_config",
         "speculative_config"),
        "to read and adjust a configuration",
    ),
    Need(
        f"{CONFIG}CacheConfig", Kind.MEMBER, ("cache_dtype", "kv_cache_dtype_skip_layers", "sliding_window"),
        "to see whether an engine asks for us, and to set its native layers and its window",
    ),
    Need(
        f"{CONFIG}AttentionConfig", Kind.MEMBER, ("backend", "flash_attn_version"),
        "to let each layer choose its backend, and to undo that FlashAttention 2 is forced",
    ),
    Need(
        f"{CONFIG}ModelConfig", Kind.MEMBER,
        ("use_mla", "is_encoder_decoder", "attn_type", "is_hybrid", "is_mm_prefix_lm", "get_total_num_kv_heads", "hf_text_config", "hf_overrides", "dtype"),
        "to refuse what is not served, before a model is loaded",
    ),
    Need(
        f"{CONFIG}ParallelConfig", Kind.MEMBER,
        ("decode_context_parallel_size", "prefill_context_parallel_size", "tensor_parallel_size", "pipeline_parallel_size"),
        "to refuse what is not served, before a model is loaded",
    ),
    Need(
        f"{CONFIG}SchedulerConfig", Kind.MEMBER,
        ("disable_chunked_mm_input", "max_num_batched_tokens", "max_num_seqs"),
        "to size the workspace, and to keep each image in one chunk",
    ),
    Need(
        "vllm.distributed.parallel_state:", Kind.MEMBER, ("model_parallel_is_initialized",),
        "to tell the layers of one pipeline stage from those of the engine",
    ),
    Need(
        "vllm.model_executor.layers.quantization.turboquant.config:", Kind.MEMBER, ("TurboQuantConfig",),
        "to serve a hybrid whose configuration names no kinds of layers",
    ),
    Need(
        "vllm.model_executor.layers.quantization.turboquant.config:TurboQuantConfig", Kind.MEMBER,
        ("get_boundary_skip_layers",),
        "to serve a hybrid whose configuration names no kinds of layers",
    ),
    Need(
        "vllm.model_executor.layers.attention.chunked_local_attention:", Kind.MEMBER,
        ("create_chunked_local_attention_backend",),
        "to give a layer that attends in chunks the backend of its own cache",
    ),
    Need(
        CONFIG, Kind.MEMBER, ("get_current_vllm_config_or_none", "get_layers_from_vllm_config"),
        "to find an engine's configuration and its layers in a worker",
    ),
    Need(
        "vllm.platforms.interface:Platform", Kind.MEMBER,
        ("get_attn_backend_cls", "is_cpu", "is_rocm", "is_cuda_alike", "device_name"),
        "to choose kernels, and to be there when a layer chooses its backend",
    ),
    Need(
        "vllm.platforms.interface:Platform", Kind.MEMBER, ("_align_heterogeneous_kv_block_size",),
        "to undo what it guesses of pages before any layer is known",
        Without.NOTHING,
    ),
    Need(
        "vllm.platforms:", Kind.MEMBER, ("builtin_platform_plugins",),
        "to see whether vLLM's own platform would be the CPU",
        Without.PLATFORM,
    ),
    Need(
        "vllm.platforms.cpu:", Kind.MEMBER, ("CpuPlatform",),
        "to send compressed layers to our class; vLLM's own would run its kernel over packed bytes",
        Without.PLATFORM,
    ),
    Need(
        "vllm.v1.attention.backends.registry:", Kind.MEMBER, ("register_backend", "AttentionBackendEnum"),
        "to put our class behind TURBOQUANT",
    ),
    Need(
        "vllm.v1.attention.backends.registry:AttentionBackendEnum", Kind.MEMBER, ("TURBOQUANT", "get_path"),
        "to put our class behind TURBOQUANT",
    ),
    Need(
        "vllm.v1.attention.selector:AttentionSelectorConfig", Kind.MEMBER, ("kv_cache_dtype", "use_mla", "use_sparse"),
        "to tell compressed layers from others on a CPU",
    ),
    # What our classes are to vLLM: whatever they override must be what vLLM calls.
    Need(
        BACKEND, Kind.MEMBER,
        (
            "AttentionBackend", "AttentionCGSupport", "AttentionImpl", "AttentionMetadata", "AttentionMetadataBuilder",
            "AttentionType", "CommonAttentionMetadata", "MultipleOf",
        ),
        "to be an attention backend",
    ),
    Need(
        f"{BACKEND}AttentionBackend", Kind.MEMBER,
        (
            "customize_spec", "forward_includes_kv_cache_update", "get_builder_cls", "get_impl_cls", "get_name",
            "get_supported_kernel_block_sizes", "supported_dtypes", "supported_kv_cache_dtypes", "supported_kv_cache_layouts",
            "supports_attn_type", "supports_compute_capability", "supports_head_size", "supports_mm_prefix",
            "supports_non_causal", "supports_sink", "supports_sliding_window", "validate_configuration",
        ),
        "to say what is served, how many bytes a page has, and that K and V are stored by a call of their own",
    ),
    Need(
        f"{BACKEND}AttentionImpl.__init__", Kind.BEGINS,
        (
            "num_heads", "head_size", "scale", "num_kv_heads", "alibi_slopes", "sliding_window", "kv_cache_dtype",
            "logits_soft_cap", "attn_type", "kv_sharing_target_layer_name",
        ),
        "to know a layer's window, soft cap and the like, each of which changes its result",
    ),
    Need(
        f"{BACKEND}AttentionImpl.forward", Kind.BEGINS,
        (
            "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output", "output_scale", "output_block_scale",
        ),
        "to attend",
    ),
    Need(
        f"{BACKEND}AttentionImpl.process_weights_after_loading", Kind.PARAMETER, ("act_dtype",),
        "to read a layer's sinks once their weights are there",
    ),
    Need(
        "vllm.model_executor.layers.attention.attention:unified_kv_cache_update", Kind.USES, ("do_kv_cache_update",),
        "to store K and V",
    ),
    Need(
        f"{ATTENTION}.__init__", Kind.USES, ("impl", "head_size_v", "kv_cache_dtype", "kv_sharing_target_layer_name"),
        "to know a layer's value dimension, and which layers share a cache",
    ),
    Need(f"{BACKEND}AttentionType", Kind.MEMBER, ("DECODER",), "to refuse other attention than a decoder's"),
    Need(f"{BACKEND}AttentionCGSupport", Kind.MEMBER, ("ALWAYS", "UNIFORM_BATCH"), "to be captured in CUDA graphs"),
    Need(
        f"{BACKEND}AttentionMetadataBuilder", Kind.MEMBER, ("_cudagraph_support", "build", "get_cudagraph_support"),
        "to describe a batch to the kernels",
    ),
    Need(
        f"{BACKEND}AttentionMetadataBuilder.__init__", Kind.USES, ("kv_cache_spec", "vllm_config", "device"),
        "to describe a batch to the kernels",
    ),
    Need(
        f"{BACKEND}AttentionMetadataBuilder.__init__", Kind.BEGINS,
        ("kv_cache_spec", "layer_names", "vllm_config", "device"),
        "to describe a batch to the kernels",
    ),
    Need(
        f"{BACKEND}AttentionMetadataBuilder.build", Kind.PARAMETER,
        ("common_prefix_len", "common_attn_metadata", "fast_build"),
        "to describe a batch to the kernels",
    ),
    Need(
        f"{BACKEND}CommonAttentionMetadata", Kind.MEMBER,
        ("num_actual_tokens", "query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping", "max_query_len", "causal"),
        "to describe a batch to the kernels",
    ),
    Need(
        f"{SPECS}AttentionSpec", Kind.MEMBER, ("state_content_bytes", "kv_quant_mode", "head_size", "head_size_v", "block_size"),
        "to set the bytes of a page",
    ),
    Need(
        f"{SPECS}KVQuantMode", Kind.MEMBER,
        ("is_turboquant", "TURBOQUANT_K8V4", "TURBOQUANT_4BIT_NC", "TURBOQUANT_K3V4_NC", "TURBOQUANT_3BIT_NC"),
        "to tell the format of a layer's pages",
    ),
    Need(f"{SPECS}KVCacheLayout", Kind.MEMBER, ("LBHNC", "LBNHC"), "to get each page as one run of bytes"),
    Need(
        "vllm.v1.core.kv_cache_planning:get_kv_cache_groups|vllm.v1.core.kv_cache_utils:get_kv_cache_groups",
        Kind.BEGINS, ("vllm_config", "kv_cache_spec"),
        "to plan pages where all layers are known",
    ),
    # Images whose tokens see each other in both directions. A rename would make them causal, or others bidirectional, in silence.
    Need(
        f"{BACKEND}CommonAttentionMetadata", Kind.MEMBER, ("mm_req_doc_ranges",),
        "to know where a batch has images",
        Without.IMAGES,
    ),
    Need(
        f"{ATTENTION}.__init__", Kind.USES, ("mm_prefix_clamp_sliding_window",),
        "to know the layers in which an image ends at the window",
        Without.IMAGES,
    ),
    Need(
        "vllm.v1.attention.backends.triton_attn:TritonAttentionMetadata", Kind.MEMBER, ("mm_prefix_range_tensor",),
        "to let Gemma 4's code take the images from its layers with full attention, which it does by this name",
        Without.IMAGES,
    ),
    # The prefill route.
    Need(
        f"{BACKEND}CommonAttentionMetadata", Kind.MEMBER, ("num_reqs", "query_start_loc_cpu", "seq_lens_cpu_upper_bound"),
        "to plan a prefill on the host",
        Without.PREFILL,
    ),
    Need(
        f"{BACKEND}AttentionMetadataBuilder", Kind.MEMBER, ("reorder_batch_threshold",),
        "to have a batch's decodes first",
        Without.PREFILL,
    ),
    Need(
        f"{BACKEND}AttentionMetadataBuilder._init_reorder_batch_threshold", Kind.PARAMETER,
        ("reorder_batch_threshold", "supports_spec_as_decode"),
        "to have a batch's decodes first",
        Without.PREFILL,
    ),
    Need(
        "vllm.vllm_flash_attn.flash_attn_interface:", Kind.MEMBER, ("is_fa_version_supported", "flash_attn_varlen_func"),
        "to attend over decoded pieces and the chunk",
        Without.PREFILL,
    ),
    Need(
        "vllm.vllm_flash_attn.flash_attn_interface:flash_attn_varlen_func", Kind.PARAMETER,
        (
            "q", "k", "v", "max_seqlen_q", "cu_seqlens_q", "max_seqlen_k", "cu_seqlens_k", "softmax_scale", "causal",
            "window_size", "return_softmax_lse", "out", "fa_version",
        ),
        "to attend over decoded pieces and the chunk",
        Without.PREFILL,
    ),
    Need(
        "vllm._custom_ops:merge_attn_states", Kind.BEGINS,
        ("output", "prefix_output", "prefix_lse", "suffix_output", "suffix_lse", "output_lse"),
        "to merge partial results",
        Without.PREFILL,
    ),
    # The page plan.
    Need(
        SPECS, Kind.MEMBER,
        ("FullAttentionSpec", "SlidingWindowSpec", "MambaSpec", "ChunkedLocalAttentionSpec"),
        "to plan pages",
        Without.PAGES,
    ),
    Need("vllm.utils.torch_utils:", Kind.MEMBER, ("get_dtype_size",), "to plan native pages", Without.PAGES),
    Need(
        f"{SPECS}AttentionSpec", Kind.MEMBER,
        (
            "num_heads", "num_kv_heads", "dtype", "tokens_per_state", "state_content_size_bytes", "page_size_padded",
            "page_size_bytes", "block_stride_alignment",
        ),
        "to plan pages",
        Without.PAGES,
    ),
    Need(
        f"{SPECS}MambaSpec", Kind.MEMBER, ("state_content_size_bytes", "max_memory_usage_bytes", "page_size_bytes"),
        "to plan the pages of states",
        Without.PAGES,
    ),
    Need(
        f"{CONFIG}CacheConfig", Kind.MEMBER, ("block_size", "user_specified_block_size", "mamba_cache_mode"),
        "to plan pages",
        Without.PAGES,
    ),
    Need(
        f"{CONFIG}SchedulerConfig", Kind.MEMBER, ("disable_hybrid_kv_cache_manager",), "to plan pages", Without.PAGES
    ),
    Need(f"{CONFIG}VllmConfig", Kind.MEMBER, ("max_in_flight_tokens",), "to plan pages", Without.PAGES),
    Need(f"{CONFIG}ModelConfig", Kind.MEMBER, ("max_model_len",), "to plan pages", Without.PAGES),
    # What is read of a model's weights.
    Need(
        f"{CONFIG}VllmConfig", Kind.MEMBER, ("load_config",), "to find the weights of a model", Without.NOTICE
    ),
    Need(
        f"{CONFIG}LoadConfig", Kind.MEMBER, ("download_dir", "load_format"), "to find the weights of a model",
        Without.NOTICE,
    ),
    Need(
        f"{CONFIG}ModelConfig", Kind.MEMBER, ("get_head_size", "model", "revision"), "to find the weights of a model",
        Without.NOTICE,
    ),
    Need(
        f"{LOADER}weight_utils:download_weights_from_hf", Kind.BEGINS,
        ("model_name_or_path", "cache_dir", "allow_patterns", "revision"), "to get the weights of a model from a hub",
        Without.EARLY,
    ),
    # Static key offsets.
    *(
        Need(
            f"{LOADER}{module}:", Kind.MEMBER, ("process_weights_after_loading",), "to see a model with its weights",
            Without.OFFSET,
        )
        for module in ("base_loader", "weight_cache.ipc_loader")
    ),
    Need(
        f"{LOADER}utils:process_weights_after_loading", Kind.BEGINS, ("model",),
        "to see a model with its weights", Without.OFFSET,
    ),
    Need(
        f"{LOADER}reload.layerwise:finalize_layerwise_processing", Kind.BEGINS, ("model",),
        "to see a model whose weights were loaded again", Without.OFFSET,
    ),
    Need(
        f"{LOADER}reload.layerwise:finalize_layerwise_reload", Kind.USES, ("finalize_layerwise_processing",),
        "to see a model whose weights were loaded again", Without.OFFSET,
    ),
    Need(
        "vllm.model_executor.layers.linear:", Kind.MEMBER, ("QKVParallelLinear", "RowParallelLinear"),
        "to find the projection of a layer's keys", Without.OFFSET,
    ),
    Need(
        "vllm.model_executor.layers.linear:QKVParallelLinear.__init__", Kind.USES,
        ("head_size", "num_heads", "num_kv_heads"), "to find the keys in its projection", Without.OFFSET,
    ),
    Need(
        "vllm.model_executor.layers.linear:LinearBase.__init__", Kind.USES, ("input_size", "params_dtype"),
        "to ask a projection for its bias", Without.OFFSET,
    ),
    Need(
        "vllm.model_executor.layers.linear:ColumnParallelLinear.forward", Kind.USES, ("bias",),
        "to ask a projection for its bias", Without.OFFSET,
    ),
    Need(
        "vllm.model_executor.layers.rotary_embedding:RotaryEmbedding.forward_native", Kind.BEGINS,
        ("positions", "query", "key"), "to rotate a bias", Without.OFFSET,
    ),
    Need(
        "vllm.model_executor.layers.attention:", Kind.MEMBER, ("Attention",), "to find a model's attention layers",
        Without.OFFSET,
    ),
    Need(f"{ATTENTION}.__init__", Kind.USES, ("layer_name",), "to know which layers share a cache", Without.OFFSET),
)  # fmt: skip


def found(of: str) -> Any:
    """The object behind `module:object`, or None."""
    for alternative in of.split("|"):
        module, _, path = alternative.partition(":")
        try:
            thing = importlib.import_module(module)
            for name in filter(None, path.split(".")):
                thing = getattr(thing, name)
        except Exception:  # a module that cannot be imported is not there, whatever it raises
            continue
        return thing
    return None


def has_member(thing: Any, name: str) -> bool:
    """Of a module, or of a class whose instances have it: vLLM declares some attributes without a value."""
    if hasattr(thing, name):
        return True
    return inspect.isclass(thing) and any(name in inspect.get_annotations(cls) for cls in thing.__mro__)


def missing(need: Need) -> list[str]:
    """Those of the names that this vLLM does not have; all of them where the object is gone."""
    thing = found(need.of)
    if thing is None:
        return list(need.names)
    if need.kind is Kind.MEMBER:
        return [name for name in need.names if not has_member(thing, name)]
    function = inspect.unwrap(thing)
    if need.kind is Kind.USES:
        return [name for name in need.names if name not in function.__code__.co_names]
    known = [name for name in inspect.signature(function).parameters if name != "self"]
    if need.kind is Kind.PARAMETER:
        return [name for name in need.names if name not in known]
    return [name for i, name in enumerate(need.names) if known[i : i + 1] != [name]]


def title(of: str) -> str:
    """What it is called in a sentence."""
    module, _, path = of.partition("|")[0].partition(":")
    return path or module


LACKS = {
    Kind.MEMBER: "has no",
    Kind.PARAMETER: "takes no",
    Kind.BEGINS: "does not take in its place",
    Kind.USES: "does not use",
}


def unmet(without: Without) -> list[str]:
    """One sentence for each object that lacks something, of the needs without which this happens."""
    return [
        f"this vLLM's {title(need.of)} {LACKS[need.kind]} {', '.join(names)}, needed {need.why}"
        for need in NEEDS
        if need.without is without and (names := missing(need))
    ]


def images_refusal(model_config: Any) -> str:
    """Why an engine cannot have images whose tokens see each other, in one sentence; "" if it can, or has none."""
    reasons = unmet(Without.IMAGES) if model_config.is_mm_prefix_lm else []
    return f"the images of this model would be attended wrongly: {'; '.join(reasons)}; {ALTERNATIVE}" if reasons else ""
