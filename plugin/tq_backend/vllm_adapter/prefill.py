"""Prefill through the platform's own attention kernel: the compressed prefix is decoded in bounded pieces, the current chunk is
read as it came, and partial results merge by their log-sum-exp (docs/kernels.md, "Prefill on a GPU").

Keys stay rotated when they are decoded, so the queries that meet them are rotated, once, and so are the chunk's keys that lie
behind decoded ones. Nothing here waits for the device: what a step does is planned on the host, once for all layers, from
lengths that the host knows. All memory comes from one workspace that all layers share, whatever the context.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tq_backend.vllm_adapter.interface import Without, unmet
from tq_backend.vllm_adapter.prefill_plan import Buffers, Decode, Geometry, Limits, Plan


@dataclass(frozen=True)
class Capability:
    """What one stock kernel on one device may serve. A layer outside of all rows is served by our `attend`."""

    compute_capability: tuple[int, int]
    flash_attention: int
    head_dims: tuple[int, ...]  # of keys and of values, which must agree
    dtypes: tuple[torch.dtype, ...]


# Windows and sinks are served; soft caps, ALiBi, bidirectional spans and batches that are not causal are not.
CAPABILITIES = (Capability((9, 0), 3, (64, 128, 256), (torch.float16, torch.bfloat16)),)


class StockAttention(Protocol):
    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_start_loc: torch.Tensor,
        key_start_loc: torch.Tensor,
        max_query_len: int,
        max_key_len: int,
        causal: bool,
        window: int,
        scale: float,
        out: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of packed sequences. query, out: [rows, heads, dim]; key, value: [rows, kv_heads, dim]; start_locs: int32
        [seqs + 1]. The causal mask is aligned to the last query and the last key; window w > 0 hides the keys w and more
        before a query. Returns out and the float32 log-sum-exp [heads, rows]."""


# (out, lse_out, first, first_lse, second, second_lse): merges two partial results; out may be second.
Merge = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


class PrefillRoute:
    """The route of one layer: what does not change between steps."""

    def __init__(
        self,
        ops: Any,
        format_id: int,
        rotates: bool,
        geometry: Geometry,
        limits: Limits,
        scale: float,
        stock: StockAttention,
        merge: Merge,
    ) -> None:
        """ops: has dequant_kv and rotate, with the LibTorch operators' arguments. rotates: whether the format rotates keys."""
        self.ops, self.format_id, self.rotates = ops, format_id, rotates
        self.geometry, self.limits, self.scale = geometry, limits, scale
        self.stock, self.merge = stock, merge
        self._buffers: Buffers | None = None

    @property
    def plan_key(self) -> tuple[int, Limits]:
        """Routes with equal keys share a step's plan."""
        return self.geometry.window, self.limits

    def run(
        self,
        plan: Plan,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: torch.Tensor,
        block_table: torch.Tensor,
        block_size: int,
        sinks: torch.Tensor | None,
        workspace: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Writes the plan's rows of out. query [tokens, heads, dim], key, value [tokens, kv_heads, dim], out [tokens, heads, dim_v]
        and block_table [seqs, blocks] are the whole batch's; sinks: float32 [heads]; workspace: uint8, workspace_size() of it, and
        not the one of `attend`."""
        if self._buffers is None or self._buffers.workspace is not workspace:
            self._buffers = Buffers(self.geometry, self.limits, workspace)
        buffers = self._buffers
        for part in plan.slices:
            rotated = query[part.queries[0] : part.queries[1]]
            if self.rotates and any(call.decode is not None for call in part.calls):
                rotated = buffers.queries[: len(rotated)]
                self.ops.rotate(query[part.queries[0] : part.queries[1]], rotated, self.format_id)
            lse = None
            for call in part.calls:
                first, end = call.queries
                if call.decode is None:
                    q, k, v = query[first:end], key[call.keys[0] : call.keys[1]], value[call.keys[0] : call.keys[1]]
                else:
                    q = rotated[first - part.queries[0] : end - part.queries[0]]
                    k, v = self._decoded(call.decode, key, value, pages, block_table, block_size, buffers)
                target = buffers.partial[: end - first] if call.merges else out[first:end]
                window = self.geometry.window if call.causal else 0
                _, found = self.stock(
                    q, k, v, call.query_start_loc, call.key_start_loc, call.max_query_len, call.max_key_len, call.causal, window,
                    self.scale, target,
                )  # fmt: skip
                if call.merges:
                    # Threads of the merge read a row's log-sum-exp while others write it, so it must not be merged in place.
                    into = buffers.lse.pop(0)
                    buffers.lse.append(into)
                    merged = into[: found.numel()].view(found.shape)
                    self.merge(out[first:end], merged, target, found, out[first:end], lse)
                    found = merged
                lse = found
                if call.last and sinks is not None:
                    # A sink adds exp(sink) to the denominator: exact whatever the kernels' own idea of sinks is.
                    out[first:end].mul_(lse.sub_(sinks[:, None]).sigmoid_().t().unsqueeze(-1))

    def _decoded(
        self,
        decode: Decode,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: torch.Tensor,
        block_table: torch.Tensor,
        block_size: int,
        buffers: Buffers,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = buffers.keys[: decode.rows], buffers.values[: decode.rows]
        self.ops.dequant_kv(
            pages, block_table[decode.seqs[0] : decode.seqs[1]], decode.first_tokens, decode.token_start_loc, self.format_id,
            block_size, k, v, True, decode.token_counts,
        )  # fmt: skip
        for first, end, at in decode.raw:
            self.ops.rotate(key[first:end], k[at : at + end - first], self.format_id)
            v[at : at + end - first].copy_(value[first:end])
        return k, v


def unserved(g: Geometry, device: torch.device, soft_cap: float, alibi: bool) -> str | None:
    """Why no row of CAPABILITIES serves a layer on a device, or None if one does."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"no stock kernel is known for devices of kind {'rocm' if torch.version.hip else device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    rows = [c for c in CAPABILITIES if c.compute_capability == (major, minor)]
    if not rows:
        return f"no stock kernel is known for compute capability {major}.{minor}"
    rows = [c for c in rows if g.dtype in c.dtypes and g.head_dim in c.head_dims and g.head_dim_v == g.head_dim]
    if not rows:
        return f"the stock kernels do not serve head_dim {g.head_dim} with head_dim_v {g.head_dim_v} in {g.dtype}"
    if soft_cap or alibi:
        return f"the layer has {'a soft cap' if soft_cap else 'ALiBi'}"
    return _missing(rows[0].flash_attention)


def _missing(flash_attention: int) -> str | None:
    lacking = unmet(Without.PREFILL)
    if lacking:
        return "; ".join(lacking)
    from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported

    if not is_fa_version_supported(flash_attention):
        return f"this vLLM was built without FlashAttention-{flash_attention}"
    return None


def flash_attention_3() -> StockAttention:
    """vLLM's FlashAttention-3, over packed keys and values."""
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_start_loc: torch.Tensor,
        key_start_loc: torch.Tensor,
        max_query_len: int,
        max_key_len: int,
        causal: bool,
        window: int,
        scale: float,
        out: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return flash_attn_varlen_func(
            query, key, value, max_seqlen_q=max_query_len, cu_seqlens_q=query_start_loc, max_seqlen_k=max_key_len,
            cu_seqlens_k=key_start_loc, softmax_scale=scale, causal=causal,
            window_size=[window - 1, 0] if window else [-1, -1], return_softmax_lse=True, out=out, fa_version=3,
        )  # fmt: skip

    return attention


def vllm_merge() -> Merge:
    """vLLM's compiled operator: its Python wrapper may choose Triton, which nothing of ours may need at run time."""
    from vllm._custom_ops import merge_attn_states

    def merge(
        out: torch.Tensor,
        lse_out: torch.Tensor,
        first: torch.Tensor,
        first_lse: torch.Tensor,
        second: torch.Tensor,
        second_lse: torch.Tensor,
    ) -> None:
        merge_attn_states(out, first, first_lse, second, second_lse, lse_out)

    return merge
