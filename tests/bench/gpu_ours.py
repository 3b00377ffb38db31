"""Compressed pools, and the library's calls over them as candidates for timing; the spot checks that go before."""

from __future__ import annotations

import math

import torch
from gpu_abi import DEVICE, Backend, Layer
from gpu_timing import Candidate, Shape, block_tables, buffer_sets, guess_us, pool_slots, slots_of

BF16 = torch.bfloat16
FILL_TOKENS, FILL_HEADS, FILL_PAGE = 65536, 8, 16
CHECKED_ROWS = 64  # query tokens of one sequence


def layer_of(shape: Shape, format_name: str) -> Layer:
    return Layer(format_name, shape.heads, shape.kv_heads, shape.dim, shape.window)


class Ours:
    """A pool per format and head_dim, filled by store_kv once. Pages are runs of atoms of 16 tokens of one head, so the same
    bytes are valid pages of any block size and number of heads."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._pools: dict[tuple[str, int], torch.Tensor] = {}
        self._workspace = torch.empty(0, dtype=torch.uint8, device=DEVICE)

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

    def workspace(self, layer: Layer, num_tokens: int, num_seqs: int) -> torch.Tensor:
        size = max(64, self.backend.workspace_size(layer, num_tokens, num_seqs))
        if self._workspace.numel() < size:
            self._workspace = torch.empty(size, dtype=torch.uint8, device=DEVICE)
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
        work = self.workspace(layer, shape.num_queries, shape.batch)
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
        work = self.workspace(layer, shape.num_queries, shape.batch)
        table = tables[-1]
        self.backend.attend(layer, pool, shape.page, query, out, start, lens, table, shape.query_len, work)()
        sequence = shape.seq_lens.index(max(shape.seq_lens)) if shape.lens else shape.batch // 2
        count = shape.seq_lens[sequence]
        key, value = torch.empty(2, count, shape.kv_heads, shape.dim, device=DEVICE, dtype=torch.float32)
        self.backend.dequant_first(layer, pool, shape.page, table[sequence], key, value)()
        rows = torch.linspace(0, shape.query_len - 1, min(CHECKED_ROWS, shape.query_len), device=DEVICE).long()
        at = sequence * shape.query_len + rows
        want = attention(query[at].float(), key, value, count - shape.query_len + rows, shape)
        error = (out[at].float() - want).abs().amax(-1) / want.abs().amax(-1)
        return torch.nan_to_num(error, nan=math.inf).max().item()

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
