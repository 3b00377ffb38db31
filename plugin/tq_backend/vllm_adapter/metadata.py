"""What one step's batch looks like to the kernels, and the workspace that all layers share."""

from __future__ import annotations

import logging
from dataclasses import dataclass
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
from tq_backend.vllm_adapter import formats
from tq_backend.vllm_adapter.spans import spans_of_batch
from tq_backend.vllm_adapter.tolerance import pass_over

logger = logging.getLogger("vllm.tq_backend")


@dataclass
class TurboQuantMetadata(AttentionMetadata):
    num_actual_tokens: int
    query_start_loc: torch.Tensor  # int32 [num_reqs + 1]
    seq_lens: torch.Tensor  # int32 [num_reqs]
    block_table: torch.Tensor  # int32 [num_reqs, max_blocks]
    slot_mapping: torch.Tensor  # int64 [num_tokens]
    block_size: int
    causal: bool
    max_query_len: int  # upper bound over the batch, or over all batches that a captured graph may be replayed for
    workspace: torch.Tensor  # uint8
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


class TurboQuantMetadataBuilder(AttentionMetadataBuilder[TurboQuantMetadata]):
    # The kernels read lengths and tables from device memory and ask the host for nothing, so a captured graph serves every
    # batch within its tokens, requests and max_query_len. vLLM captures mixed batches with max_query_len = tokens, and decodes
    # with the uniform length, so that bound holds at each replay.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS
    # One buffer per device for all layers and groups of this process: layers run one after another. It grows while builders
    # are made, never during a step.
    _workspaces: ClassVar[dict[torch.device, torch.Tensor]] = {}

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device, **unknown: Any
    ) -> None:
        pass_over("a metadata builder", unknown)
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        check_shared_caches(get_layers_from_vllm_config(vllm_config, Attention))
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        scheduler = vllm_config.scheduler_config
        # Gemma 4 clamps an image to the window; up to the window's length that changes nothing.
        self.longest_span = max(
            (x.impl.sliding_window for x in layers.values() if getattr(x, "mm_prefix_clamp_sliding_window", False)),
            default=0,
        )
        needed = 0
        for impl in {id(layer.impl): layer.impl for layer in layers.values()}.values():
            impl.per_head_floats(device)
            size = torch_ops().workspace_size(
                impl.num_heads,
                impl.num_kv_heads,
                impl.head_size,
                impl.head_size_v,
                formats.format_id(impl.kv_cache_dtype),
                scheduler.max_num_batched_tokens,
                scheduler.max_num_seqs,
                device_index(device),
            )
            needed = max(needed, size)
        if device not in self._workspaces or self._workspaces[device].numel() < needed:
            self._workspaces[device] = torch.empty(needed, dtype=torch.uint8, device=device)
        names = sorted({formats.page_format(layer.impl.kv_cache_dtype) for layer in layers.values()})
        logger.info(
            "tq-backend %s serves %s in %d layers (%s): %d bytes per token and KV head, pages of %d tokens",
            native().build_id(),
            ", ".join(names),
            len(layers),
            ", ".join(layer_names),
            kv_cache_spec.state_content_size_bytes,
            kv_cache_spec.block_size,
        )

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
        causal = getattr(common, "causal", True)
        if isinstance(causal, torch.Tensor):
            raise NotImplementedError(
                "TURBOQUANT takes one causal flag for the whole batch; this batch mixes causal and bidirectional requests"
            )
        return TurboQuantMetadata(
            num_actual_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            block_size=self.kv_cache_spec.block_size,
            causal=bool(causal),
            max_query_len=common.max_query_len,
            workspace=self._workspaces[self.device],
            mm_prefix_range_tensor=spans_of_batch(
                getattr(common, "mm_req_doc_ranges", None),
                common.seq_lens.shape[0],
                self.device,
                self.longest_span,
            ),
        )
