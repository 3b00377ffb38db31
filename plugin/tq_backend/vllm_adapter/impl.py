"""One attention layer: store K and V into pages, attend over pages."""

from __future__ import annotations

import math
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from tq_backend._library import torch_ops
from tq_backend.vllm_adapter import formats, patches
from tq_backend.vllm_adapter.metadata import TurboQuantMetadata
from tq_backend.vllm_adapter.prefill import PrefillRoute
from tq_backend.vllm_adapter.tolerance import pass_over


def pages(kv_cache: torch.Tensor, page_bytes: int) -> torch.Tensor:
    """The cache [blocks, ...] with its other dimensions in memory order, so that each block is one run of bytes whatever
    the engine calls its layout. Raises ValueError if a block has not page_bytes: another size would be stored and read in wrong
    places."""
    inner = sorted(range(1, kv_cache.dim()), key=kv_cache.stride, reverse=True)
    if (found := math.prod(kv_cache.shape[1:])) != page_bytes:
        raise ValueError(
            f"kv_cache has the shape {list(kv_cache.shape)}, {found} bytes in a block; a block of this layer has {page_bytes}"
        )
    return kv_cache.permute(0, *inner)


class TurboQuantImpl(AttentionImpl[TurboQuantMetadata]):
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(f"TURBOQUANT serves decoder attention; attn_type is {attn_type}")
        if kv_cache_dtype == "auto":
            raise NotImplementedError(
                "this model's code gives TURBOQUANT a layer that keeps the native cache: it chooses a backend before vLLM skips the "
                "layer; set additional_config['turboquant']['skip_layers'] to []"
            )
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.head_size_v = extra.pop("head_size_v", None) or head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.format_id = formats.format_id(kv_cache_dtype)
        self.sliding_window = sliding_window or 0
        self.logits_soft_cap = logits_soft_cap or 0.0
        self.alibi_slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self.sinks = extra.pop("sinks", None)
        self.kernel_sinks: torch.Tensor | None = None
        # Float32 [num_kv_heads, head_size], taken from every key that is stored: what all keys of a head share (key_offsets.py).
        self.key_offset: torch.Tensor | None = None
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.prefill_route: PrefillRoute | None = None  # given by the metadata builder, which knows device and dtype
        pass_over("an attention layer", extra)
        if formats.subtracts_key_offset(kv_cache_dtype):
            patches.apply_to_loading(TurboQuantImpl)
        self.ops = torch_ops()
        self.set_pages(self.head_size_v, 0)

    def set_pages(self, head_size_v: int, block_size: int) -> None:
        """From the metadata builder, before there is a cache: vLLM tells these to the layer and to the builder."""
        self.head_size_v, self.block_size = head_size_v, block_size
        slot = formats.slot_bytes(self.kv_cache_dtype, self.head_size, head_size_v)
        self.page_bytes = self.num_kv_heads * block_size * slot

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Again after weights were loaded anew: a captured CUDA graph reads the same memory, so it is written in place."""
        if self.sinks is not None:
            self.per_head_floats(self.sinks.device)

    def per_head_floats(self, device: torch.device) -> None:
        """Puts sinks and slopes where the kernels read them: float32, on the layer's device."""
        if self.alibi_slopes is not None:
            self.alibi_slopes = self.alibi_slopes.to(device)
        if self.sinks is None:
            return
        if self.kernel_sinks is None or self.kernel_sinks.device != device:
            self.kernel_sinks = self.sinks.detach().to(device, torch.float32, copy=True)
        else:
            self.kernel_sinks.copy_(self.sinks.detach())

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        **unknown: Any,
    ) -> None:
        """key, value: [tokens, num_kv_heads, head_size]; kv_cache: uint8 [blocks, ...]; slot_mapping: [tokens]."""
        pass_over("do_kv_cache_update", unknown)
        if kv_cache.numel() == 0:  # profiling, before there is a cache
            return
        view = pages(kv_cache, self.page_bytes)
        self.ops.store_kv(key, value, view, slot_mapping, self.format_id, self.block_size, self.key_offset)

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: TurboQuantMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
        **unknown: Any,
    ) -> torch.Tensor:
        """query: [tokens, num_heads, head_size]; output: [tokens, num_heads, head_size_v], written in place. key and value
        [tokens, num_kv_heads, head_size] are read by the prefill route only; whatever else is attended comes from pages, the
        current tokens too."""
        pass_over("forward", unknown)
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("TURBOQUANT does not write quantized outputs; output_scale must be None")
        if attn_metadata is None:  # profiling
            return output.zero_()
        m = attn_metadata
        route = self.prefill_route
        plan = None if route is None or key is None or value is None else m.plans.get(route.plan_key)
        # A captured graph is replayed for other batches than the one that was planned: `attend` reads lengths from device memory.
        if plan is None or (query.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._attend(query, kv_cache, m, m.num_actual_tokens, len(m.seq_lens), m.max_query_len, output)
            return output
        if self.key_offset is not None:  # so that the chunk's raw keys are as those in pages
            key = key - self.key_offset.to(key.dtype)
        if m.num_decodes > 0:
            self._attend(query, kv_cache, m, m.num_decode_tokens, m.num_decodes, m.max_decode_query_len, output)
        route.run(
            plan,
            query,
            key,
            value,
            pages(kv_cache, self.page_bytes),
            m.block_table,
            self.block_size,
            self.kernel_sinks,
            m.route_workspace,
            output,
        )
        return output

    def _attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        m: TurboQuantMetadata,
        num_tokens: int,
        num_seqs: int,
        max_query_len: int,
        output: torch.Tensor,
    ) -> None:
        """The first num_seqs sequences of the batch, which are its first num_tokens rows."""
        self.ops.attend(
            query[:num_tokens],
            output[:num_tokens],
            pages(kv_cache, self.page_bytes),
            m.query_start_loc[: num_seqs + 1],
            m.seq_lens[:num_seqs],
            m.block_table,
            self.format_id,
            self.block_size,
            self.num_kv_heads,
            self.scale,
            m.causal,
            self.sliding_window,
            self.logits_soft_cap,
            self.kernel_sinks,
            self.alibi_slopes,
            None,
            m.workspace,
            max_query_len,
            m.mm_prefix_range_tensor,
        )
