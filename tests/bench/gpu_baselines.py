"""What compressed attention and stores are compared with, each timed on random bf16 (or e4m3) data as its engine calls it.

FA3, the Triton kernels and the cache write are vLLM's, of a wheel on PYTHONPATH; cuDNN's attention comes with torch. What is
missing raises on building the candidate.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from gpu_abi import DEVICE
from gpu_timing import Candidate, Shape, block_tables, buffer_sets, guess_us, pool_slots, slots_of

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
FILL = 1 << 28  # elements at once
IN_TREE_PAGE, IN_TREE_SPLITS = 16, 32  # vLLM's defaults
IN_TREE_BYTES_PER_US = 2e5
TRITON_SEGMENTS = 16
COPY_BYTES_PER_US = 2e6


class RawPool:
    """Random normal elements of one dtype, seen as whatever cache is wanted; grows."""

    def __init__(self) -> None:
        self._data: dict[torch.dtype, torch.Tensor] = {}

    def clear(self) -> None:
        self._data.clear()

    def take(self, dtype: torch.dtype, elements: int) -> torch.Tensor:
        if dtype not in self._data or self._data[dtype].numel() < elements:
            self._data.pop(dtype, None)
            torch.cuda.empty_cache()
            data = torch.empty(elements, device=DEVICE, dtype=dtype)
            for at in range(0, elements, FILL):
                part = data[at : at + FILL]
                part.copy_(torch.randn(part.shape, device=DEVICE, dtype=BF16))
            self._data[dtype] = data
        return self._data[dtype]


def paged(pool: RawPool, shape: Shape, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Keys and values [blocks, page, kv_heads, dim] as in vLLM's cache, block tables of each set, bytes that one set reads."""
    nbytes = shape.raw_bytes(dtype.itemsize)
    blocks = pool_slots(shape, nbytes) // shape.page
    size = (blocks, 2, shape.page, shape.kv_heads, shape.dim)
    kv = pool.take(dtype, math.prod(size))[: math.prod(size)].view(size)
    return kv[:, 0], kv[:, 1], block_tables(shape, buffer_sets(nbytes), blocks), nbytes


def written(out: torch.Tensor, call: Any) -> None:
    """Calls once. A kernel that was left out of a build may do nothing."""
    out.fill_(math.nan)
    call()
    torch.cuda.synchronize()
    if not bool(torch.isfinite(out.float()).all()):
        raise RuntimeError("the kernel left NaN in its output")


def fa3(pool: RawPool, shape: Shape, dtype: torch.dtype = BF16) -> Candidate:
    """FlashAttention-3 of the vLLM wheel over a paged cache."""
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func, get_scheduler_metadata

    key, value, tables, nbytes = paged(pool, shape, dtype)
    start, lens = shape.tensors()
    window = [shape.window - 1, 0] if shape.window else [-1, -1]
    plan = get_scheduler_metadata(
        batch_size=shape.batch, max_seqlen_q=shape.query_len, max_seqlen_k=shape.context, num_heads_q=shape.heads,
        num_heads_kv=shape.kv_heads, headdim=shape.dim, cache_seqlens=lens, qkv_dtype=dtype, cu_seqlens_q=start,
        page_size=shape.page, causal=True, window_size=tuple(window), num_splits=0,
    )  # fmt: skip
    queries = shape.queries(len(tables))
    out = torch.empty_like(queries[0])
    options: dict[str, Any] = {}
    if dtype == FP8:
        one = torch.ones(shape.batch, shape.kv_heads, device=DEVICE)
        options = {"q_descale": one, "k_descale": one, "v_descale": one}
        queries = queries.to(FP8)

    def call(i: int) -> None:
        flash_attn_varlen_func(
            queries[i], key, value, max_seqlen_q=shape.query_len, cu_seqlens_q=start, max_seqlen_k=shape.context,
            seqused_k=lens, softmax_scale=shape.dim**-0.5, causal=True, window_size=window, block_table=tables[i],
            scheduler_metadata=plan, num_splits=0, fa_version=3, out=out, **options,
        )  # fmt: skip

    written(out, lambda: call(0))
    return Candidate([lambda i=i: call(i) for i in range(len(tables))], nbytes, guess_us(shape, nbytes))


def cudnn(pool: RawPool, shape: Shape) -> Candidate:
    """torch's scaled_dot_product_attention by cuDNN over contiguous keys and values, equally long sequences without a window.
    Causal where the sequences are all queries; otherwise there is no mask, which for a few query tokens is the same work."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    nbytes = shape.raw_bytes(2)
    sets = buffer_sets(nbytes) if nbytes < 1 << 30 else 1
    size = (sets, shape.batch, shape.kv_heads, shape.context, shape.dim)
    key, value = pool.take(BF16, 2 * math.prod(size))[: 2 * math.prod(size)].view(2, *size)
    queries = shape.queries(sets).view(sets, shape.batch, shape.query_len, shape.heads, shape.dim).transpose(2, 3)
    causal = shape.query_len == shape.context

    def call(i: int) -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(
                queries[i], key[i], value[i], is_causal=causal, enable_gqa=shape.heads != shape.kv_heads
            )

    call(0)
    return Candidate([lambda i=i: call(i) for i in range(sets)], nbytes, guess_us(shape, nbytes))


def cudnn_parts(pool: RawPool, shape: Shape) -> Candidate:
    """cuDNN's attention over a prefix without a mask, and causal over the chunk behind it: torch has no mask for both at once that
    cuDNN takes. The two results are not merged, so this is a little faster than what could be used."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    nbytes = shape.raw_bytes(2)
    prefix = shape.context - shape.query_len
    sets = buffer_sets(nbytes) if nbytes < 1 << 28 else 2
    size = (sets, shape.batch, shape.kv_heads, shape.context, shape.dim)
    key, value = pool.take(BF16, 2 * math.prod(size))[: 2 * math.prod(size)].view(2, *size)
    queries = shape.queries(sets).view(sets, shape.batch, shape.query_len, shape.heads, shape.dim).transpose(2, 3)

    def call(i: int) -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            for part, causal in ((slice(0, prefix), False), (slice(prefix, None), True)):
                torch.nn.functional.scaled_dot_product_attention(
                    queries[i], key[i][:, :, part], value[i][:, :, part], is_causal=causal,
                    enable_gqa=shape.heads != shape.kv_heads,
                )  # fmt: skip

    call(0)
    return Candidate([lambda i=i: call(i) for i in range(sets)], nbytes, guess_us(shape, nbytes))


def triton_paged(pool: RawPool, shape: Shape) -> Candidate:
    """vLLM's Triton decode attention, which it uses where FA3 has no kernel (head_dim above 256)."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    key, value, tables, nbytes = paged(pool, shape, BF16)
    start, lens = shape.tensors()
    queries = shape.queries(len(tables))
    out = torch.empty_like(queries[0])
    limit = 128 // shape.kv_heads  # sequences up to which the context is split
    segments = (limit, shape.heads, TRITON_SEGMENTS)
    partial = torch.empty(*segments, 1 << (shape.dim - 1).bit_length(), device=DEVICE)
    top, total = torch.empty(segments, device=DEVICE), torch.empty(segments, device=DEVICE)

    def call(i: int) -> None:
        unified_attention(
            q=queries[i], k=key, v=value, out=out, cu_seqlens_q=start, max_seqlen_q=shape.query_len, seqused_k=lens,
            max_seqlen_k=shape.context, softmax_scale=shape.dim**-0.5, causal=True, window_size=(-1, -1),
            block_table=tables[i], softcap=0.0, q_descale=None, k_descale=None, v_descale=None, seq_threshold_3D=limit,
            num_par_softmax_segments=TRITON_SEGMENTS, softmax_segm_output=partial, softmax_segm_max=top,
            softmax_segm_expsum=total,
        )  # fmt: skip

    written(out, lambda: call(0))
    return Candidate([lambda i=i: call(i) for i in range(len(tables))], nbytes, 2 * guess_us(shape, nbytes))


class InTree:
    """vLLM's own TurboQuant store and decode with one preset's parameters; slots [blocks, page, kv_heads, slot_bytes]."""

    def __init__(self, preset: str, dim: int) -> None:
        from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
        from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
        from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention
        from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store

        self._store, self._decode = triton_turboquant_store, triton_turboquant_decode_attention
        config = TurboQuantConfig.from_cache_dtype(preset, dim)
        self.slot, self.dim, self.correct = config.slot_size_aligned, dim, config.norm_correction
        self.centroids = get_centroids(dim, config.centroid_bits).to(device=DEVICE, dtype=torch.float32)
        ordered = self.centroids.sort().values
        self.midpoints = (ordered[:-1] + ordered[1:]) / 2
        hadamard = torch.ones(1, 1)
        while hadamard.shape[0] < dim:
            hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
        self.rotation = (hadamard / math.sqrt(dim)).to(DEVICE)
        self.sizes = {
            "mse_bits": config.key_mse_bits,
            "key_packed_size": config.key_packed_size,
            "value_quant_bits": config.effective_value_quant_bits,
            "key_fp8": config.key_fp8,
        }

    def store(self, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        self._store(key, value, cache, slots, self.rotation, self.midpoints, **self.sizes)

    def decode(
        self, query: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, lens: torch.Tensor, buffers: Any
    ) -> Any:
        return self._decode(
            query=query, kv_cache=cache, block_table=table, seq_lens=lens, Pi=self.rotation, PiT=self.rotation,
            centroids=self.centroids, scale=1 / math.sqrt(self.dim), norm_correction=self.correct,
            max_num_kv_splits=IN_TREE_SPLITS, mid_o_buf=buffers[0], output_buf=buffers[1], lse_buf=buffers[2],
            **self.sizes,
        )  # fmt: skip


def in_tree(shape: Shape, preset: str) -> Candidate:
    """vLLM's Triton TurboQuant decode, on pages of its default size whatever the shape says."""
    kernel = InTree(preset, shape.dim)
    shape = Shape(shape.batch, shape.context, shape.heads, shape.kv_heads, shape.dim, IN_TREE_PAGE)
    nbytes = shape.tokens_read * shape.kv_heads * kernel.slot
    blocks = pool_slots(shape, nbytes) // shape.page
    tables = block_tables(shape, buffer_sets(nbytes), blocks)
    cache = torch.zeros(blocks, shape.page, shape.kv_heads, kernel.slot, dtype=torch.uint8, device=DEVICE)
    for at in range(0, blocks * shape.page, 65536):
        slots = torch.arange(at, min(at + 65536, blocks * shape.page), device=DEVICE)
        key, value = torch.randn(2, len(slots), shape.kv_heads, shape.dim, device=DEVICE, dtype=BF16)
        kernel.store(key, value, cache, slots)
    _, lens = shape.tensors()
    queries = shape.queries(len(tables))
    buffers = (
        torch.empty(shape.batch, shape.heads, IN_TREE_SPLITS, shape.dim + 1, device=DEVICE),
        torch.empty(shape.batch, shape.heads, shape.dim, device=DEVICE, dtype=BF16),
        torch.empty(shape.batch, shape.heads, device=DEVICE),
    )
    calls = [lambda i=i: kernel.decode(queries[i], cache, tables[i], lens, buffers) for i in range(len(tables))]
    return Candidate(calls, nbytes, max(20.0, nbytes / IN_TREE_BYTES_PER_US))


def store_inputs(tokens: int, kv_heads: int, dim: int, page: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Keys and values [sets, 2, tokens, kv_heads, dim], slots [sets, tokens] and the blocks they lie in: whole random pages for
    a prefill's many tokens, random slots for a decode step's few."""
    nbytes = tokens * kv_heads * dim * 4
    sets = min(64, buffer_sets(nbytes))
    kv = torch.randn(sets, 2, tokens, kv_heads, dim, device=DEVICE, dtype=BF16)
    blocks = max(1024, math.ceil(tokens / page) * sets)
    if tokens >= 1024:
        tables = torch.randperm(blocks, device=DEVICE)[: sets * math.ceil(tokens / page)].view(sets, -1)
        return kv, torch.stack([slots_of(table, page, tokens) for table in tables]), blocks
    return kv, torch.randperm(blocks * page, device=DEVICE)[: sets * tokens].view(sets, tokens), blocks


def plain_copy(kv: torch.Tensor) -> Candidate:
    """The bytes of a bf16 cache write by one elementwise kernel, to where they come anyway. torch.neg: a copy would become a
    memcpy of the copy engine."""
    out = torch.empty_like(kv)
    nbytes = 2 * kv[0].nbytes
    calls = [lambda i=i: torch.neg(kv[i], out=out[i]) for i in range(len(kv))]
    return Candidate(calls, nbytes, max(2.0, nbytes / COPY_BYTES_PER_US))


def cache_write(kv: torch.Tensor, slots: torch.Tensor, blocks: int, page: int) -> Candidate:
    """vLLM's reshape_and_cache_flash into a bf16 cache."""
    import vllm._custom_ops as ops

    one = torch.ones(1, device=DEVICE)
    key, value = torch.zeros(2, blocks, page, *kv.shape[3:], device=DEVICE, dtype=BF16)

    def call(i: int) -> None:
        ops.reshape_and_cache_flash(kv[i, 0], kv[i, 1], key, value, slots[i], "auto", one, one)

    call(0)
    nbytes = 2 * kv[0].nbytes
    return Candidate([lambda i=i: call(i) for i in range(len(kv))], nbytes, max(2.0, nbytes / COPY_BYTES_PER_US))
