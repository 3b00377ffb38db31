"""`tq bench`: CPU decode attention over 4-bit pages against vLLM's stock CPU kernel over a bf16 cache.

One query token per sequence, GQA 4, head_dim 128, context 4,096. Each call reads another layer's cache, as a model's step
does, and the caches together are larger than the processor's; calls of both kernels take turns, medians count. The shapes are a
7B-class model's (32 query heads, 8 KV heads).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tq_backend._library import native, torch_ops
from tq_backend.cli.results import Figure, write_results

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 128
CACHE_BYTES = 128 << 20  # of one kernel's layers together, in bf16


def stock_calls(batch: int, context: int, layers: int) -> list[Callable[[], None]]:
    """vLLM's own decode over `layers` bf16 caches, with the instruction set that its backend would choose here."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()  # vLLM's worker does; without it the kernel's first AMX instruction is illegal
    isa = _get_attn_isa(torch.bfloat16, BLOCK_SIZE, HEAD_DIM)
    blocks = batch * context // BLOCK_SIZE
    key = torch.randn(batch * context, KV_HEADS, HEAD_DIM).bfloat16()
    value = torch.randn(batch * context, KV_HEADS, HEAD_DIM).bfloat16()
    caches = []
    for _ in range(layers):
        cache = torch.zeros(blocks, KV_HEADS, BLOCK_SIZE * 2, HEAD_DIM, dtype=torch.bfloat16).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            key, value, *cache, torch.arange(batch * context), isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
        )
        caches.append(cache)
    query = torch.randn(batch, HEADS, HEAD_DIM).bfloat16()
    out = torch.empty_like(query)
    start, lens, table = batch_tables(batch, context)
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=batch, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, seq_lens=lens, dtype=torch.bfloat16,
        query_start_loc=start, causal=True, sliding_window_size=-1, isa=isa, enable_kv_split=True, dynamic_causal=None,
        kv_cache_dtype="auto",
    )  # fmt: skip

    def call(cache: tuple[torch.Tensor, torch.Tensor]) -> None:
        ops.cpu_attention_with_kv_cache(
            query=query, key_cache=cache[0], value_cache=cache[1], output=out, query_start_loc=start, seq_lens=lens,
            scale=HEAD_DIM**-0.5, causal=True, alibi_slopes=None, sliding_window=-1, block_table=table, softcap=0.0,
            scheduler_metadata=plan, s_aux=None,
        )  # fmt: skip

    return [lambda cache=cache: call(cache) for cache in caches]


def our_calls(format_name: str, batch: int, context: int, layers: int) -> list[Callable[[], None]]:
    ops = torch_ops()
    spec = native().kv_cache_spec(format_name, KV_HEADS, HEAD_DIM)
    blocks = batch * context // BLOCK_SIZE
    key = torch.randn(batch * context, KV_HEADS, HEAD_DIM).bfloat16()
    value = torch.randn(batch * context, KV_HEADS, HEAD_DIM).bfloat16()
    caches = []
    for _ in range(layers):
        pages = torch.zeros(blocks, spec["bytes_per_token"] * BLOCK_SIZE, dtype=torch.uint8)
        ops.store_kv(key, value, pages, torch.arange(batch * context), spec["format_id"], BLOCK_SIZE)
        caches.append(pages)
    query = torch.randn(batch, HEADS, HEAD_DIM).bfloat16()
    out = torch.empty_like(query)
    start, lens, table = batch_tables(batch, context)
    size = ops.workspace_size(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM, spec["format_id"])
    workspace = torch.zeros(size, dtype=torch.uint8)  # as attend wants it before its first use

    def call(pages: torch.Tensor) -> None:
        ops.attend(
            query, out, pages, start, lens, table, spec["format_id"], BLOCK_SIZE, KV_HEADS, HEAD_DIM**-0.5, True, 0, 0.0,
            None, None, None, workspace,
        )  # fmt: skip

    return [lambda pages=pages: call(pages) for pages in caches]


def batch_tables(batch: int, context: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    blocks = batch * context // BLOCK_SIZE
    return (
        torch.arange(batch + 1, dtype=torch.int32),
        torch.full((batch,), context, dtype=torch.int32),
        torch.arange(blocks, dtype=torch.int32).view(batch, -1),
    )


def medians(kernels: list[list[Callable[[], None]]], rounds: int) -> list[float]:
    """Median milliseconds per call of each kernel; their calls take turns, so that both meet the same machine."""
    times: list[list[float]] = [[] for _ in kernels]
    for i in range(rounds):
        for calls, taken in zip(kernels, times, strict=True):
            began = time.perf_counter()
            calls[i % len(calls)]()
            taken.append((time.perf_counter() - began) * 1e3)
    warm = rounds // 5
    return [statistics.median(taken[warm:]) for taken in times]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--formats", nargs="+", default=["turboquant_4bit_nc"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path, help="write the figures there")


def run(args: argparse.Namespace) -> int:
    torch.manual_seed(0)
    figures = []
    for batch in args.batches:
        layers = max(2, CACHE_BYTES // (batch * args.context * KV_HEADS * HEAD_DIM * 4))
        kernels = [stock_calls(batch, args.context, layers)]
        kernels += [our_calls(name, batch, args.context, layers) for name in args.formats]
        stock, *ours = medians(kernels, args.rounds)
        shape = f"batch {batch}, context {args.context}"
        for name, value in zip(args.formats, ours, strict=True):
            bar = "1.0" if name == "turboquant_4bit_nc" else ""
            baseline = f"stock vLLM bf16 {stock:.3f} ms; ours {value:.3f} ms"
            figures.append(
                Figure(
                    f"CPU decode attention, {name}, {shape}", round(stock / value, 3), "times as fast", bar, baseline
                )
            )
    for figure in figures:
        print(f"{figure.figure:65s} {figure.value:6.2f} {figure.unit} ({figure.baseline})")
    if args.json is not None:
        write_results(args.json, figures)
    return 1 if any(figure.bar and figure.value < float(figure.bar) for figure in figures) else 0
