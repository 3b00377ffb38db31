"""The prefill route: its result against attention from the definition, and its plans against their bounds.

On a CPU the stock kernel is one from the definition (stock_attention.py), all else is what runs on a GPU.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from dataclasses import replace

import pytest
import stock_attention
import torch
from engines import ROOT
from tq_backend._library import native, torch_ops
from tq_backend.vllm_adapter import prefill
from tq_backend.vllm_adapter.formats import format_id, rotates_keys
from tq_backend.vllm_adapter.metadata import MAX_DECODE_QUERY_LEN
from tq_backend.vllm_adapter.options import format_names
from tq_backend.vllm_adapter.prefill import CAPABILITIES, PrefillRoute
from tq_backend.vllm_adapter.prefill_plan import (
    DECODED_BYTES,
    MIB,
    STOCK_BYTES,
    WORKSPACE_BYTES,
    Buffers,
    Geometry,
    Limits,
    Plan,
    limits_of,
    make_plan,
    workspace_size,
)

CPU = torch.device("cpu")
SEED = 20261125
# float32 all along, sums of at most 300 terms; rotating queries and keys apart adds some 1e-6 to a score. 3e-6 was seen; the
# smallest mistake (one token more or less) moves a row by more than 1e-2.
TOLERANCE = 3e-5


class Batch:
    """Sequences with compressed prefixes and chunks of float32, in pages of 16 tokens in random order."""

    def __init__(
        self, seed: int, kv_format: str, heads: int, kv_heads: int, dim: int, lens: list[tuple[int, int]]
    ) -> None:
        """lens: (prefix, chunk) of each sequence."""
        self.generator = torch.Generator().manual_seed(seed)
        self.kv_format, self.heads, self.kv_heads, self.dim, self.lens = kv_format, heads, kv_heads, dim, lens
        self.starts = list(itertools.accumulate((n for _, n in lens), initial=0))
        tokens = self.starts[-1]
        self.query = self.normal(tokens, heads, dim) * 2
        self.key, self.value = self.normal(tokens, kv_heads, dim), self.normal(tokens, kv_heads, dim)
        blocks = max(math.ceil((p + n) / 16) for p, n in lens)
        self.table = torch.randperm(len(lens) * blocks, generator=self.generator).int().view(len(lens), blocks)
        spec = native().kv_cache_spec(kv_format, kv_heads, dim)
        self.pages = torch.zeros(len(lens) * blocks, spec["bytes_per_token"] * 16, dtype=torch.uint8)
        for s, (prefix, count) in enumerate(lens):
            # The chunk's own slots hold something else, so that a route that read them from pages would be seen.
            kv = self.normal(2, prefix + count, kv_heads, dim)
            at = torch.arange(prefix + count)
            torch_ops().store_kv(
                *kv, self.pages, self.table[s].long()[at // 16] * 16 + at % 16, format_id(kv_format), 16
            )

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def route(self, limits: Limits, window: int = 0) -> PrefillRoute:
        geometry = Geometry(self.heads, self.kv_heads, self.dim, self.dim, torch.float32, window)
        return PrefillRoute(
            torch_ops(), format_id(self.kv_format), rotates_keys(self.kv_format), geometry, limits, self.dim**-0.5,
            stock_attention.attention, stock_attention.merge,
        )  # fmt: skip

    def plan(self, route: PrefillRoute, first_seq: int = 0) -> Plan | None:
        lens = [p + n for p, n in self.lens[first_seq:]]
        return make_plan(self.starts[first_seq:], lens, first_seq, route.geometry.window, route.limits, CPU)

    def run(self, route: PrefillRoute, sinks: torch.Tensor | None = None, first_seq: int = 0) -> torch.Tensor:
        """The route's output; rows that it must not write are NaN."""
        plan = self.plan(route, first_seq)
        assert plan is not None
        size = workspace_size(route.geometry, route.limits)
        workspace = torch.full((size,), 255, dtype=torch.uint8)  # NaN, wherever it is read unwritten
        out = torch.full_like(self.query, math.nan)
        route.run(plan, self.query, self.key, self.value, self.pages, self.table, 16, sinks, workspace, out)
        return out

    def wanted(self, window: int = 0, sinks: torch.Tensor | None = None) -> torch.Tensor:
        """In float64 from the definition: decoded, unrotated prefix tokens, then the chunk."""
        out = torch.empty_like(self.query, dtype=torch.float64)
        group = self.heads // self.kv_heads
        for s, (prefix, count) in enumerate(self.lens):
            rows = slice(self.starts[s], self.starts[s + 1])
            k, v = torch.empty(2, prefix, self.kv_heads, self.dim)
            first, start = torch.zeros(1, dtype=torch.int32), torch.tensor([0, prefix], dtype=torch.int32)
            torch_ops().dequant_kv(
                self.pages, self.table[s : s + 1], first, start, format_id(self.kv_format), 16, k, v, False
            )
            k, v = (
                torch.cat([a, b[rows]]).double().repeat_interleave(group, 1)
                for a, b in ((k, self.key), (v, self.value))
            )
            score = torch.einsum("qhd,khd->hqk", self.query[rows].double(), k) * self.dim**-0.5
            i, j = torch.arange(prefix, prefix + count)[:, None], torch.arange(prefix + count)
            score.masked_fill_((j > i) | (j <= i - window if window else torch.tensor(False)), -math.inf)
            bottom = score.logsumexp(-1, keepdim=True)
            if sinks is not None:
                bottom = torch.logaddexp(bottom, sinks.double()[:, None, None])
            out[rows] = torch.einsum("hqk,khd->qhd", (score - bottom).exp(), v)
        return out


def random_lens(draw: random.Random) -> list[tuple[int, int]]:
    sizes = [(draw.choice([0, 0, 1, 15, 16, 40, 100, 200]), draw.choice([0, 1, 2, 17, 64, 90])) for _ in range(6)]
    return [*sizes[: draw.randint(1, 6)], (draw.choice([0, 33]), 5)]


@pytest.mark.parametrize("kv_format", format_names())
def test_equals_attention_over_decoded_prefix_and_raw_chunk(kv_format):
    """Pieces from smaller than a chunk to larger than everything, slices from a few queries to all: the same result."""
    draw = random.Random(f"{SEED} {kv_format}")
    print("seed", SEED)
    for case in range(8):
        kv_heads, group, dim = draw.choice([1, 2]), draw.choice([1, 3, 4]), draw.choice([64, 80, 128])
        batch = Batch(SEED + case, kv_format, kv_heads * group, kv_heads, dim, random_lens(draw))
        sinks = batch.normal(batch.heads) if case % 3 == 0 else None
        wanted = batch.wanted(sinks=sinks)
        for limits in (Limits(32, 1000), Limits(128, 24), Limits(144, 1000), Limits(4096, 50)):
            got = batch.run(batch.route(limits), sinks)
            where = f"{kv_format} case {case} {batch.lens} {limits}"
            torch.testing.assert_close(
                got.double(), wanted, rtol=0, atol=TOLERANCE, msg=lambda m, where=where: f"{where}: {m}"
            )


def test_windows_see_the_last_tokens_of_the_prefix():
    draw = random.Random(SEED)
    print("seed", SEED)
    refused = 0
    for case, window in enumerate([1, 2, 16, 33, 64, 100, 1000] * 2):
        batch = Batch(SEED + case, "turboquant_4bit_nc", 4, 2, 64, random_lens(draw))
        sinks = batch.normal(4) if case >= 7 else None
        for limits in (Limits(96, 1000), Limits(512, 24), Limits(512, 1000)):
            route = batch.route(limits, window)
            if batch.plan(route) is None:  # a chunk and the window before it are more than a piece
                refused += 1
                assert any(p > 0 and min(p, window - 1) + n > limits.piece_tokens for p, n in batch.lens)
                continue
            torch.testing.assert_close(
                batch.run(route, sinks).double(), batch.wanted(window, sinks), rtol=0, atol=TOLERANCE,
                msg=lambda m, case=case, limits=limits: f"case {case} {limits}: {m}",
            )  # fmt: skip
    assert refused > 0


def test_sequences_before_the_first_are_left_alone():
    batch = Batch(SEED, "turboquant_3bit_nc", 4, 2, 64, [(50, 1), (20, 4), (70, 40), (0, 30)])
    got = batch.run(batch.route(Limits(64, 32)), first_seq=2)
    assert got[:5].isnan().all()
    torch.testing.assert_close(got[5:].double(), batch.wanted()[5:], rtol=0, atol=TOLERANCE)


def test_few_calls():
    """What a plan costs: one call where prefix and chunk fit into a piece, otherwise one per piece of both; one merge less."""

    def calls(lens: list[tuple[int, int]], piece: int = 1024) -> list[tuple[bool, bool]]:
        starts = list(itertools.accumulate((n for _, n in lens), initial=0))
        plan = make_plan(starts, [p + n for p, n in lens], 0, 0, Limits(piece, 100000), CPU)
        return [(call.decode is not None, call.merges) for part in plan.slices for call in part.calls]

    first, raw, merged = (True, False), (False, False), (True, True)
    assert calls([(0, 500), (0, 700), (0, 5000)]) == [raw]
    assert calls([(100, 100), (200, 100), (300, 224)]) == [first]  # exactly one piece
    assert calls([(100, 100), (200, 100), (301, 224)]) == [first, first]
    assert calls([(3 * 1024 + 512, 512)]) == [first, merged, merged, merged]
    assert calls([(1024, 1025)]) == [raw, merged]  # the chunk does not fit
    assert calls([(100, 100), (0, 100), (0, 100)]) == [first, raw]


@pytest.mark.parametrize("window", [0, 40])
def test_plans_stay_within_their_bounds(window):
    draw = random.Random(SEED + window)
    print("seed", SEED)
    for _ in range(300):
        limits = Limits(draw.choice([48, 100, 128, 1000]), draw.choice([1, 7, 64, 1000]))
        lens = random_lens(draw) + random_lens(draw)
        starts = list(itertools.accumulate((n for _, n in lens), initial=0))
        plan = make_plan(starts, [p + n for p, n in lens], 0, window, limits, CPU)
        if plan is None:
            continue
        served = torch.zeros(starts[-1], dtype=torch.int64)
        for part in plan.slices:
            decodes = [call.decode for call in part.calls if call.decode is not None]
            if decodes:
                assert part.queries[1] - part.queries[0] <= limits.slice_tokens
            for decode in decodes:
                assert decode.rows <= limits.piece_tokens
                assert decode.token_start_loc[-1] == decode.rows
                assert all(at + end - first <= decode.rows for first, end, at in decode.raw)
            for call in part.calls:
                assert part.queries[0] <= call.queries[0] < call.queries[1] <= part.queries[1]
                served[call.queries[0] : call.queries[1]] += not call.merges
        assert (served == 1).all()


def test_memory_does_not_exceed_its_bounds():
    """What the stock kernel allocates is counted too: its log-sum-exps, and its own partial results of short chunks."""
    for heads, kv_heads, dim in itertools.product((8, 16, 32, 48, 64), (1, 4, 8, 16, 32), (64, 128, 256)):
        if heads % kv_heads or heads * dim > 64 * 128:
            continue
        for max_num_tokens in (512, 8192, 65536):
            geometry = Geometry(heads, kv_heads, dim, dim, torch.bfloat16)
            limits = limits_of(geometry, max_num_tokens)
            stock = STOCK_BYTES + 2 * 4 * heads * limits.slice_tokens
            assert workspace_size(geometry, limits) + stock <= WORKSPACE_BYTES == 256 * MIB, geometry
            buffers = Buffers(
                geometry, limits, torch.empty(workspace_size(geometry, limits), dtype=torch.uint8, device="meta")
            )
            assert buffers.keys.nbytes + buffers.values.nbytes <= DECODED_BYTES == 64 * MIB
            # Enough of both that a piece is worth its merge, and a slice of queries worth decoding the prefix again.
            assert limits.piece_tokens >= 2048 and limits.slice_tokens >= min(max_num_tokens, 4096)
    assert limits_of(Geometry(32, 8, 128, 128, torch.bfloat16), 8192) == Limits(16384, 8192)


def test_the_longest_decode_is_the_kernels():
    """Chunks up to that length go to `attend`'s decode kernel; the CUDA kernels compile the number in."""
    sources = [path.read_text() for path in (ROOT / "csrc" / "kernels" / "cuda").rglob("*") if path.is_file()]
    found = re.findall(r"constexpr int kMaxDecodeQueryLen = (\d+);", "\n".join(sources))
    assert found == [str(MAX_DECODE_QUERY_LEN)]


def test_what_the_capability_table_does_not_name_is_said(monkeypatch):
    gpu, plain = torch.device("cuda:0"), Geometry(32, 8, 128, 128, torch.bfloat16)
    capability = (9, 0)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(prefill, "_missing", lambda version: None if version == 3 else "another version")
    for row in CAPABILITIES:
        for dim, dtype in itertools.product(row.head_dims, row.dtypes):
            good = replace(plain, head_dim=dim, head_dim_v=dim, dtype=dtype, window=128)
            assert prefill.unserved(good, gpu, 0.0, False) is None
    for geometry, cap, alibi, words in (
        (replace(plain, head_dim=80, head_dim_v=80), 0.0, False, "head_dim 80"),
        (replace(plain, head_dim_v=64), 0.0, False, "head_dim_v 64"),
        (replace(plain, dtype=torch.float32), 0.0, False, "float32"),
        (plain, 30.0, False, "soft cap"),
        (plain, 0.0, True, "ALiBi"),
    ):
        assert words in prefill.unserved(geometry, gpu, cap, alibi)
    capability = (8, 0)
    assert "compute capability 8.0" in prefill.unserved(plain, gpu, 0.0, False)
    assert "cpu" in prefill.unserved(plain, CPU, 0.0, False)
