"""What one step's batch looks like to the kernels, and the workspace that all layers share."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from tq_backend._library import device_index, native, torch_ops
from tq_backend.names import LOGGER
from tq_backend.vllm_adapter import formats, prefill
from tq_backend.vllm_adapter.interface import images_refusal
from tq_backend.vllm_adapter.options import check_in_force, read_options
from tq_backend.vllm_adapter.prefill_plan import Geometry, Limits, Plan, limits_of, make_plan, workspace_size
from tq_backend.vllm_adapter.spans import spans_of_batch
from tq_backend.vllm_adapter.tolerance import pass_over

logger = logging.getLogger(LOGGER)


# Query tokens up to which a sequence's chunk is always read from pages, by `attend`'s decode kernel: decodes, and the verification
# of drafts. The CUDA kernels' own kMaxDecodeQueryLen, asserted equal in tests/engine/test_prefill.py.
MAX_DECODE_QUERY_LEN = 16


@dataclass
class TurboQuantMetadata(AttentionMetadata):
    num_actual_tokens: int
    query_start_loc: torch.Tensor  # int32 [num_reqs + 1]
    seq_lens: torch.Tensor  # int32 [num_reqs]
    block_table: torch.Tensor  # int32 [num_reqs, max_blocks]
    slot_mapping: torch.Tensor  # int64 [num_tokens]
    causal: bool
    max_query_len: int  # upper bound over the batch, or over all batches that a captured graph may be replayed for
    workspace: torch.Tensor  # uint8, of `attend`
    route_workspace: torch.Tensor  # uint8, of the prefill route
    # The prefill route's plans for the sequences behind the first num_decodes, by PrefillRoute.plan_key; empty if there are none,
    # or if `attend` is to serve the whole batch.
    plans: dict[tuple[int, Limits], Plan] = field(default_factory=dict)
    num_decodes: int = 0
    num_decode_tokens: int = 0
    max_decode_query_len: int = 0
    # Bidirectional spans, int32 [num_reqs, max_spans, 2], or None. Gemma 4 sets the attribute of this name to None for its layers
    # with full attention.
    mm_prefix_range_tensor: torch.Tensor | None = None


def check_shared_caches(layers: dict[str, Any]) -> None:
    """Raises NotImplementedError if a layer reads another one's cache in a format that is not its own.

    vLLM chooses native layers by number, without looking at what they share. Its CPU kernel would then read compressed pages as
    floats, and past their end, and give NaN without a word.
    """
    for name, layer in layers.items():
        target = layers.get(layer.kv_sharing_target_layer_name)
        if target is not None and target.kv_cache_dtype != layer.kv_cache_dtype:
            raise NotImplementedError(
                f"{name} has the cache dtype {layer.kv_cache_dtype} and reads the cache of "
                f"{layer.kv_sharing_target_layer_name}, which is {target.kv_cache_dtype}; both must be skipped or neither: set "
                "additional_config['turboquant']['skip_layers']"
            )


def check_window(layers: dict[str, Any], window: int | None) -> None:
    """Raises NotImplementedError if the user set a window and a layer has none: a few models take it back."""
    without = sorted(name for name, layer in layers.items() if not layer.impl.sliding_window)
    if window is not None and without:
        raise NotImplementedError(
            f"additional_config['turboquant']['sliding_window'] is {window}, and this model's code leaves "
            f"{', '.join(without)} without a window; leave the option away for it"
        )


class TurboQuantMetadataBuilder(AttentionMetadataBuilder[TurboQuantMetadata]):
    # The kernels read lengths and tables from device memory and ask the host for nothing, so a captured graph serves every
    # batch within its tokens, requests and max_query_len. vLLM captures mixed batches with max_query_len = tokens, and decodes
    # with the uniform length, so that bound holds at each replay.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS
    # One buffer per device and use for all layers and groups of this process: layers run one after another. It grows while
    # builders are made, never during a step. `attend` and the prefill route have one each: arrival counters of `attend` live in
    # its workspace from one call to the next, and what the route leaves in there would make a later decode merge too early.
    _workspaces: ClassVar[dict[tuple[torch.device, str], torch.Tensor]] = {}

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device, **unknown: Any
    ) -> None:
        pass_over("a metadata builder", unknown)
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        check_in_force(vllm_config.additional_config)
        # Again here: a configuration that EngineArgs did not make was not checked at its making.
        if refused := images_refusal(vllm_config.model_config):
            raise NotImplementedError(f"tq-backend: {refused}")
        check_shared_caches(get_layers_from_vllm_config(vllm_config, Attention))
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        check_window(layers, read_options(vllm_config.additional_config).sliding_window)
        for layer in layers.values():  # vLLM gives these to the layer and the builder, not to the implementation
            layer.impl.set_pages(layer.head_size_v, kv_cache_spec.block_size)
        impls = list({id(layer.impl): layer.impl for layer in layers.values()}.values())
        # Gemma 4 clamps an image to the window; up to the window's length that changes nothing.
        self.longest_span = max(
            (x.impl.sliding_window for x in layers.values() if getattr(x, "mm_prefix_clamp_sliding_window", False)),
            default=0,
        )
        needed = 0
        for impl in impls:
            impl.per_head_floats(device)
            size = torch_ops().workspace_size(
                impl.num_heads,
                impl.num_kv_heads,
                impl.head_size,
                impl.head_size_v,
                formats.format_id(impl.kv_cache_dtype),
                device_index(device),
            )
            needed = max(needed, size)
        self._reserve("attend", needed)
        self._reserve("route", self._route_prefill(impls))
        names = sorted({formats.page_format(layer.impl.kv_cache_dtype) for layer in layers.values()})
        logger.info(
            "tq-backend %s serves %s in %d layers (%s): %d bytes per token and KV head, pages of %d tokens",
            native().build_id(),
            ", ".join(names),
            len(layers),
            ", ".join(layer_names),
            kv_cache_spec.state_content_bytes,
            kv_cache_spec.block_size,
        )

    def _reserve(self, use: str, num_bytes: int) -> None:
        kept = self._workspaces.get((self.device, use))
        if kept is None or kept.numel() < num_bytes:
            # Zeros: the counters that `attend` keeps in its workspace begin there, and it leaves them at zero after each call.
            self._workspaces[self.device, use] = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)

    def _route_prefill(self, impls: list[Any]) -> int:
        """Gives the layers that may have one a prefill route. Returns the bytes of workspace that the routes need."""
        needed = 0
        self.plan_keys: set[tuple[int, Limits]] = set()
        current = read_options(self.vllm_config.additional_config).current
        if (current or ("compressed" if self.device.type == "cpu" else "raw")) == "compressed":
            return needed
        reasons = set()
        for impl in impls:
            geometry = Geometry(
                impl.num_heads, impl.num_kv_heads, impl.head_size, impl.head_size_v, self.vllm_config.model_config.dtype,
                impl.sliding_window,
            )  # fmt: skip
            reason = prefill.unserved(geometry, self.device, impl.logits_soft_cap, impl.alibi_slopes is not None)
            if reason is not None:
                reasons.add(reason)
                continue
            limits = limits_of(geometry, self.vllm_config.scheduler_config.max_num_batched_tokens)
            needed = max(needed, workspace_size(geometry, limits))
            impl.prefill_route = prefill.PrefillRoute(
                torch_ops(), impl.format_id, formats.rotates_keys(impl.kv_cache_dtype), geometry, limits, impl.scale,
                prefill.flash_attention_3(), prefill.vllm_merge(),
            )  # fmt: skip
            self.plan_keys.add(impl.prefill_route.plan_key)
        for reason in sorted(reasons):
            logger.warning(
                "TURBOQUANT prefills by its own kernel, which reads the current chunk from pages: %s", reason
            )
        if self.plan_keys:  # the runner then puts sequences with few query tokens first
            self._init_reorder_batch_threshold(MAX_DECODE_QUERY_LEN, supports_spec_as_decode=True)
        return needed

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """A captured graph has no spans. A decode needs none, since all images lie before it; a prefill does."""
        if vllm_config.model_config.is_mm_prefix_lm:
            return AttentionCGSupport.UNIFORM_BATCH
        return cls._cudagraph_support

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **unknown: Any,
    ) -> TurboQuantMetadata:
        pass_over("build", unknown)
        common = common_attn_metadata
        if isinstance(common.causal, torch.Tensor):
            raise NotImplementedError(
                "TURBOQUANT takes one causal flag for the whole batch; this batch mixes causal and bidirectional requests"
            )
        metadata = TurboQuantMetadata(
            num_actual_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            causal=bool(common.causal),
            max_query_len=common.max_query_len,
            workspace=self._workspaces[self.device, "attend"],
            route_workspace=self._workspaces[self.device, "route"],
            mm_prefix_range_tensor=spans_of_batch(
                # Where it is gone, no engine with such images was made: images_refusal.
                getattr(common, "mm_req_doc_ranges", None),
                common.seq_lens.shape[0],
                self.device,
                self.longest_span,
            ),
        )
        if metadata.causal and self.plan_keys and metadata.mm_prefix_range_tensor is None:
            plan_prefill(metadata, common, self.plan_keys, self.reorder_batch_threshold)
        return metadata


def plan_prefill(
    metadata: TurboQuantMetadata,
    common: CommonAttentionMetadata,
    plan_keys: set[tuple[int, Limits]],
    max_decode_query_len: int,
) -> None:
    """Splits a batch, whose decodes come first, and plans its prefills: from lengths on the host, without waiting for the device."""
    seq_lens = common.seq_lens_cpu_upper_bound  # exact where a sequence prefills
    if seq_lens is None or common.max_query_len <= max_decode_query_len:
        return
    start = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
    counts = [end - begin for begin, end in itertools.pairwise(start)]
    decodes = next((i for i, n in enumerate(counts) if n > max_decode_query_len), None)
    if decodes is None:
        return
    lens = seq_lens[decodes : common.num_reqs].tolist()
    if any(0 < n <= max_decode_query_len and n < length for n, length in zip(counts[decodes:], lens, strict=True)):
        return  # the runner did not put decodes first; the host may not know how many of their drafts were accepted
    plans = {}
    for window, limits in plan_keys:
        plan = make_plan(start[decodes:], lens, decodes, window, limits, metadata.query_start_loc.device)
        if plan is not None:
            plans[window, limits] = plan
    metadata.plans = plans
    metadata.num_decodes, metadata.num_decode_tokens = decodes, start[decodes]
    metadata.max_decode_query_len = max(counts[:decodes], default=0)
