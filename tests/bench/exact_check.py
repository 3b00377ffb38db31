"""Largest error of CPU attention over compressed pages, against attention in double over the decoded cache.

    python tests/bench/exact_check.py [--json OUT] [--configs N]

Seeded random shapes: every format, head_dim 64-512, GQA 1-8, pages of 16-128, decode, multi-token and prefill queries, windows,
soft caps, ALiBi, sinks, ragged batches. The cache is decoded through dequant_kv in float32; the attention is numpy in float64,
written here from the definition. Errors are relative to the row's largest output.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from pathlib import Path

import numpy as np
import torch
from tq_backend._library import native, torch_ops
from tq_backend.cli.results import Figure, write_results

SEED = 20261123
BARS = {torch.float32: 1e-3, torch.bfloat16: 1e-2}


def attention(q, k, v, scale, query_len, window, cap, slope, sink):
    """One sequence and one head in float64: q [n, d], k [seq, d], v [seq, dv]."""
    seq = len(k)
    position = np.arange(seq - query_len, seq)[:, None]
    key = np.arange(seq)[None, :]
    score = q @ k.T * scale
    if cap:
        score = cap * np.tanh(score / cap)
    score = score + slope * (key - position)
    seen = key <= position
    if window:
        seen &= key > position - window
    score = np.where(seen, score, -np.inf)
    top = np.maximum(score.max(-1, keepdims=True), sink)
    weight = np.exp(score - top)
    return weight @ v / (weight.sum(-1, keepdims=True) + np.exp(sink - top))


def one_case(rng: random.Random, dtype: torch.dtype) -> tuple[float, str]:
    ops = torch_ops()
    name = rng.choice([f["name"] for f in native().formats()])
    dim = rng.choice([64, 80, 96, 112, 128, 128, 192, 256, 512])
    kv_heads = rng.choice([1, 2, 4])
    heads = kv_heads * rng.choice([1, 2, 3, 4, 5, 8])
    block = rng.choice([16, 32, 64, 128])
    window, cap = rng.choice([0, 0, 5, 64]), rng.choice([0.0, 0.0, 20.0])
    alibi, sinks = rng.random() < 0.3, rng.random() < 0.3
    lens = [rng.choice([1, 16, 17, 64, 100, 333]) for _ in range(rng.randint(1, 3))]
    query_lens = [min(n, rng.choice([1, 1, 1, 4, 33, 333])) for n in lens]
    case = f"{name} dim {dim} heads {heads}:{kv_heads} block {block} window {window} cap {cap} alibi {alibi} sinks {sinks} {query_lens}/{lens}"

    info = native().kv_cache_spec(name, kv_heads, dim)
    per_seq = math.ceil(max(lens) / block)
    table = torch.randperm(len(lens) * per_seq).to(torch.int32).view(len(lens), per_seq)
    pages = torch.randint(0, 256, (len(lens) * per_seq, info["bytes_per_token"] * block), dtype=torch.uint8)
    query = (torch.randn(sum(query_lens), heads, dim) * 2).to(dtype)
    out = torch.full_like(query, math.nan)
    cached = []
    for row, n in zip(table, lens, strict=True):
        slots = row.long()[torch.arange(n) // block] * block + torch.arange(n) % block
        ops.store_kv(
            torch.randn(n, kv_heads, dim), torch.randn(n, kv_heads, dim), pages, slots, info["format_id"], block
        )
        key, value = torch.empty(n, kv_heads, dim), torch.empty(n, kv_heads, dim)
        first, rows = torch.zeros(1, dtype=torch.int32), torch.tensor([0, n], dtype=torch.int32)
        ops.dequant_kv(pages, row[None], first, rows, info["format_id"], block, key, value, False)
        cached.append((key.double().numpy(), value.double().numpy()))
    start = torch.tensor([0, *np.cumsum(query_lens)], dtype=torch.int32)
    slopes = torch.tensor([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)]) if alibi else None
    sink = torch.randn(heads) if sinks else None
    size = ops.workspace_size(heads, kv_heads, dim, dim, info["format_id"])
    ops.attend(
        query, out, pages, start, torch.tensor(lens, dtype=torch.int32), table, info["format_id"], block, kv_heads, dim**-0.5,
        True, window, cap, sink, slopes, None, torch.zeros(size, dtype=torch.uint8),
    )  # fmt: skip

    worst = 0.0
    for s, (key, value) in enumerate(cached):
        rows = slice(int(start[s]), int(start[s + 1]))
        for h in range(heads):
            want = attention(
                query[rows, h].double().numpy(), key[:, h * kv_heads // heads], value[:, h * kv_heads // heads], dim**-0.5,
                query_lens[s], window, cap, float(slopes[h]) if alibi else 0.0, float(sink[h]) if sinks else -np.inf,
            )  # fmt: skip
            error = np.abs(out[rows, h].double().numpy() - want).max(-1) / np.abs(want).max(-1)
            worst = max(worst, float(np.nan_to_num(error, nan=np.inf).max()))
    return worst, case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--configs", type=int, default=300, help="per dtype")
    args = parser.parse_args()
    figures = []
    for dtype, bar in BARS.items():
        rng = random.Random(SEED)
        torch.manual_seed(SEED)
        worst, case = max(one_case(rng, dtype) for _ in range(args.configs))
        kind = str(dtype).removeprefix("torch.")
        figures.append(
            Figure(
                f"largest relative error of attend, {kind}, {args.configs} shapes", worst, "1", f"<= {bar}", "float64"
            )
        )
        print(f"{kind}: {worst:.2e} (bar {bar}) at {case}; seed {SEED}")
    if args.json:
        write_results(args.json, figures)
    return 0 if all(f.value <= bar for f, bar in zip(figures, BARS.values(), strict=True)) else 1


if __name__ == "__main__":
    sys.exit(main())
