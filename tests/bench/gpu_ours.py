"""Compressed pools, and the library's calls over them as candidates for timing; the spot checks that go before."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_abi import DEVICE, Backend, Layer
from gpu_timing import Candidate, Shape, block_tables, buffer_sets, guess_us, pool_slots, slots_of

sys.path.append(str(Path(__file__).resolve().parents[2] / "plugin"))  # the prefill route; its modules need torch only
from tq_backend.vllm_adapter import prefill
from tq_backend.vllm_adapter.prefill_plan import Geometry, limits_of, make_plan, workspace_size

BF16 = torch.bfloat16
FILL_TOKENS, FILL_HEADS, FILL_PAGE = 65536, 8, 16
CHECKED_ROWS = 64  # query tokens of one sequence
MAX_BATCHED_TOKENS = 8192  # that the prefill route's workspace is for


def layer_of(shape: Shape, format_name: str) -> Layer:
    return Layer(format_name, shape.heads, shape.kv_heads, shape.dim, shape.window)


class RouteOps:
    """dequant_kv and rotate with the LibTorch operators' arguments, through the C ABI."""

    def __init__(self, backend: Backend, layer: Layer) -> None:
        self.backend, self.layer = backend, layer

    def dequant_kv(
        self, pages: torch.Tensor, table: torch.Tensor, first: torch.Tensor, start: torch.Tensor, _format_id: int,
        block_size: int, key: torch.Tensor, value: torch.Tensor, keep_rotated: bool, counts: torch.Tensor | None,
    ) -> None:  # fmt: skip
        self.backend.dequant_kv(self.layer, pages, block_size, table, first, start, key, value, keep_rotated, counts)()

    def rotate(self, x: torch.Tensor, out: torch.Tensor, _format_id: int) -> None:
        self.backend.rotate(self.layer, x, out)()


@dataclass
class Routed:
    """The prefill route over a pool, and what its results are checked with."""

    candidate: Candidate
    layer: Layer
    pool: torch.Tensor
    tables: torch.Tensor  # [sets, batch, pages]
    queries: torch.Tensor  # [sets, tokens, heads, dim]
    kv: torch.Tensor  # the chunks' keys and values, [sets, 2, tokens, kv_heads, dim]
    out: torch.Tensor  # of the last call


class Ours:
    """A pool per format and head_dim, filled by store_kv once. Pages are runs of atoms of 16 tokens of one head, so the same
    bytes are valid pages of any block size and number of heads."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._pools: dict[tuple[str, int], torch.Tensor] = {}
        self._workspace = torch.zeros(0, dtype=torch.uint8, device=DEVICE)

    def clear(self) -> None:
        self._pools.clear()

    def _pool(self, format_name: str, dim: int, nbytes: int) -> torch.Tensor:
        key = (format_name, dim)
        if key not in self._pools or self._pools[key].numel() < nbytes:
            self._pools.pop(key, None)
            torch.cuda.empty_cache()
            self._pools[key] = self._filled(Layer(format_name, FILL_HEADS, FILL_HEADS, dim), nbytes)
        return self._pools[key]

    def _filled(self, layer: Layer, nbytes: int) -> torch.Tensor:
        page_bytes = FILL_HEADS * FILL_PAGE * self.backend.slot_bytes(layer)
        tokens = math.ceil(nbytes / page_bytes) * FILL_PAGE
        pool = torch.empty(tokens // FILL_PAGE * page_bytes, dtype=torch.uint8, device=DEVICE)
        for at in range(0, tokens, FILL_TOKENS):
            slots = torch.arange(at, min(at + FILL_TOKENS, tokens), device=DEVICE)
            key, value = torch.randn(2, len(slots), FILL_HEADS, layer.dim, device=DEVICE, dtype=BF16)
            self.backend.store_kv(layer, pool, FILL_PAGE, key, value, slots)()
        return pool

    def workspace(self, layer: Layer) -> torch.Tensor:
        size = max(64, self.backend.workspace_size(layer))
        if self._workspace.numel() < size:
            self._workspace = torch.zeros(size, dtype=torch.uint8, device=DEVICE)  # attend finds zeros at first
        return self._workspace[:size]

    def _placed(self, shape: Shape, format_name: str) -> tuple[Layer, torch.Tensor, torch.Tensor, int]:
        """Layer, pool, block tables of each set, and the bytes that one set reads."""
        layer = layer_of(shape, format_name)
        slot = self.backend.slot_bytes(layer) * shape.kv_heads
        nbytes = shape.tokens_read * slot
        slots = pool_slots(shape, nbytes)
        pool = self._pool(format_name, shape.dim, slots * slot)
        return layer, pool, block_tables(shape, buffer_sets(nbytes), slots // shape.page), nbytes

    def attend(self, shape: Shape, format_name: str) -> Candidate:
        layer, pool, tables, nbytes = self._placed(shape, format_name)
        start, lens = shape.tensors()
        queries = shape.queries(len(tables))
        out = torch.empty_like(queries[0])
        work = self.workspace(layer)
        calls = [
            self.backend.attend(layer, pool, shape.page, query, out, start, lens, table, shape.query_len, work)
            for query, table in zip(queries, tables, strict=True)
        ]
        return Candidate(calls, nbytes, guess_us(shape, nbytes))

    def check(self, shape: Shape, format_name: str) -> float:
        """Largest error of the batch's middle sequence (a ragged one's longest), against attention in float32 over what
        dequant_kv gives; relative to the largest output of a query row and head. NaN counts as infinite."""
        layer, pool, tables, _ = self._placed(shape, format_name)
        start, lens = shape.tensors()
        query = shape.queries(1)[0]
        out = torch.full_like(query, math.nan)
        work = self.workspace(layer)
        table = tables[-1]
        self.backend.attend(layer, pool, shape.page, query, out, start, lens, table, shape.query_len, work)()
        sequence = shape.seq_lens.index(max(shape.seq_lens)) if shape.lens else shape.batch // 2
        key, value = self._dequantized(layer, pool, shape, table[sequence], shape.seq_lens[sequence])
        return largest_error(query, out, key, value, sequence, shape)

    def _dequantized(
        self, layer: Layer, pool: torch.Tensor, shape: Shape, table: torch.Tensor, count: int
    ) -> torch.Tensor:
        """The first `count` keys and values of one sequence: float32 [2, count, kv_heads, dim]."""
        kv = torch.empty(2, count, shape.kv_heads, shape.dim, device=DEVICE, dtype=torch.float32)
        self.backend.dequant_first(layer, pool, shape.page, table, kv[0], kv[1])()
        return kv

    def _routed(self, shape: Shape, format_name: str, sets: int) -> Routed:
        """The prefill route's whole step for one layer, on at most `sets` sets of buffers."""
        layer, pool, tables, nbytes = self._placed(shape, format_name)
        tables = tables[:sets]
        geometry = Geometry(shape.heads, shape.kv_heads, shape.dim, shape.dim, BF16, shape.window)
        limits = limits_of(geometry, MAX_BATCHED_TOKENS)
        route = prefill.PrefillRoute(
            RouteOps(self.backend, layer), self.backend.format_id(format_name), format_name != "turboquant_k8v4", geometry,
            limits, shape.dim**-0.5, prefill.flash_attention_3(), prefill.vllm_merge(),
        )  # fmt: skip
        starts = [i * shape.query_len for i in range(shape.batch + 1)]
        plan = make_plan(starts, shape.seq_lens, 0, shape.window, limits, torch.device(DEVICE))
        if plan is None:
            raise RuntimeError("the prefill route does not serve this shape")
        workspace = torch.empty(workspace_size(geometry, limits), dtype=torch.uint8, device=DEVICE)
        queries = shape.queries(len(tables))
        size = (len(tables), 2, shape.num_queries, shape.kv_heads, shape.dim)
        kv = torch.randn(size, device=DEVICE, dtype=BF16)
        out = torch.full_like(queries[0], math.nan)

        def call(i: int) -> None:
            route.run(plan, queries[i], kv[i, 0], kv[i, 1], pool, tables[i], shape.page, None, workspace, out)

        calls = [lambda i=i: call(i) for i in range(len(tables))]
        return Routed(Candidate(calls, nbytes, guess_us(shape, nbytes)), layer, pool, tables, queries, kv, out)

    def route(self, shape: Shape, format_name: str) -> Candidate:
        """Prefill through FA3 over decoded pieces: rotation, decode, attention and merges."""
        return self._routed(shape, format_name, 4).candidate

    def check_route(self, shape: Shape, format_name: str) -> float:
        """As check, over the dequantized prefix and the chunk as it came."""
        r = self._routed(shape, format_name, 1)
        r.candidate.calls[0]()
        sequence = shape.batch // 2
        prefix = shape.seq_lens[sequence] - shape.query_len
        rows = slice(sequence * shape.query_len, (sequence + 1) * shape.query_len)
        kv = r.kv[0][:, rows].float()
        if prefix > 0:
            kv = torch.cat([self._dequantized(r.layer, r.pool, shape, r.tables[0][sequence], prefix), kv], 1)
        return largest_error(r.queries[0], r.out, kv[0], kv[1], sequence, shape)

    def dequant(self, shape: Shape, format_name: str, keep_rotated: bool) -> Candidate:
        """Of one sequence into bf16; the bytes read and written."""
        layer, pool, tables, nbytes = self._placed(shape, format_name)
        key, value = torch.empty(2, shape.context, shape.kv_heads, shape.dim, device=DEVICE, dtype=BF16)
        calls = [
            self.backend.dequant_first(layer, pool, shape.page, table[0], key, value, keep_rotated) for table in tables
        ]
        moved = nbytes + shape.raw_bytes(2)
        return Candidate(calls, moved, guess_us(shape, moved))

    def store(self, kv: torch.Tensor, slots: torch.Tensor, blocks: int, page: int, format_name: str) -> Candidate:
        """kv: [sets, 2, tokens, kv_heads, dim], slots: [sets, tokens]; the bytes read and written."""
        kv_heads, dim = kv.shape[3:]
        layer = Layer(format_name, kv_heads, kv_heads, dim)
        slot = self.backend.slot_bytes(layer) * kv_heads
        pool = torch.zeros(blocks * page * slot, dtype=torch.uint8, device=DEVICE)
        calls = [self.backend.store_kv(layer, pool, page, kv[i, 0], kv[i, 1], slots[i]) for i in range(len(slots))]
        nbytes = kv[0].nbytes + slots.shape[1] * slot
        return Candidate(calls, nbytes, max(2.0, nbytes / 2e6))

    def check_store(self, format_name: str, kv_heads: int, dim: int, page: int, count: int = 100) -> float:
        """Stored and dequantized keys and values against the host reference codec: norm of the difference over the norm, so
        that a code that rounding moved does not count much."""
        layer = Layer(format_name, kv_heads, kv_heads, dim)
        table = torch.randperm(16, device=DEVICE)[: math.ceil(count / page)].to(torch.int32)
        pool = torch.zeros(16 * page * kv_heads * self.backend.slot_bytes(layer), dtype=torch.uint8, device=DEVICE)
        kv = torch.randn(2, count, kv_heads, dim, device=DEVICE, dtype=BF16)
        back = torch.full(kv.shape, math.nan, device=DEVICE, dtype=torch.float32)
        self.backend.store_kv(layer, pool, page, kv[0], kv[1], slots_of(table, page, count))()
        self.backend.dequant_first(layer, pool, page, table, back[0], back[1])()
        worst = 0.0
        for got, given, is_key in ((back[0], kv[0], True), (back[1], kv[1], False)):
            want = self.backend.fake_quantize(layer, given.reshape(-1, dim), is_key)
            error = ((got.reshape(-1, dim).cpu() - want).norm() / want.norm()).item()
            worst = max(worst, error if math.isfinite(error) else math.inf)
        return worst


def largest_error(
    query: torch.Tensor, out: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sequence: int, shape: Shape
) -> float:
    """Of some rows of one sequence whose keys and values [tokens, kv_heads, dim] are given in float32."""
    rows = torch.linspace(0, shape.query_len - 1, min(CHECKED_ROWS, shape.query_len), device=DEVICE).long()
    at = sequence * shape.query_len + rows
    want = attention(query[at].float(), key, value, len(key) - shape.query_len + rows, shape)
    error = (out[at].float() - want).abs().amax(-1) / want.abs().amax(-1)
    return torch.nan_to_num(error, nan=math.inf).max().item()


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position: torch.Tensor, shape: Shape
) -> torch.Tensor:
    """Causal float32 attention of query rows [rows, heads, dim] at the given positions over [tokens, kv_heads, dim]."""
    group = shape.heads // shape.kv_heads
    token = torch.arange(len(key), device=key.device)
    seen = token[None, :] <= position[:, None]
    if shape.window:
        seen &= token[None, :] > position[:, None] - shape.window
    hidden = ~seen.repeat_interleave(group, 0)
    out = torch.empty_like(query)
    for head in range(shape.kv_heads):
        mine = slice(head * group, (head + 1) * group)
        score = query[:, mine].reshape(-1, shape.dim) @ key[:, head].T * shape.dim**-0.5
        weight = score.masked_fill(hidden, -math.inf).softmax(-1)
        out[:, mine] = (weight @ value[:, head]).view(-1, group, shape.dim)
    return out
