"""What a step's prefill does on the prefill route (prefill.py): which tokens are decoded into which piece, and which calls of the
stock kernel read them. Made on the host, once for all layers, from lengths that the host knows; sizes and tables only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

MIB = 1 << 20
DECODED_BYTES = 64 * MIB  # of keys and values at once: of one piece, for all of its sequences
WORKSPACE_BYTES = 256 * MIB  # of everything that a prefill needs, whatever the batch
# Of it, what the stock kernel allocates by itself where a short chunk makes it split the keys: one float32 tile of 128 rows for
# each of about two waves of an H200's 132 multiprocessors at head_dim 128.
STOCK_BYTES = 24 * MIB
ROW_MULTIPLE = 128  # rows of a full piece, and of a slice of queries: the stock kernels' largest tile
ALIGNMENT = 256  # bytes, of each buffer in the workspace


@dataclass(frozen=True)
class Geometry:
    """Of a layer, as far as memory and plans go."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    window: int = 0  # tokens a query sees, itself included; 0: all before it


@dataclass(frozen=True)
class Limits:
    piece_tokens: int  # rows of the decoded keys and values
    slice_tokens: int  # query rows that have rotated queries and partial results at one time


def limits_of(g: Geometry, max_num_tokens: int) -> Limits:
    """The largest that keep a layer within DECODED_BYTES and WORKSPACE_BYTES in steps of up to max_num_tokens tokens."""
    piece = DECODED_BYTES // (g.num_kv_heads * (g.head_dim + g.head_dim_v) * g.dtype.itemsize)
    # Four log-sum-exps: two that are being merged come from the stock kernel, two merged ones alternate.
    per_token = g.num_heads * ((g.head_dim + g.head_dim_v) * g.dtype.itemsize + 4 * 4)
    rows = (WORKSPACE_BYTES - DECODED_BYTES - STOCK_BYTES) // per_token
    return Limits(
        piece // ROW_MULTIPLE * ROW_MULTIPLE,
        max_num_tokens if max_num_tokens <= rows else rows // ROW_MULTIPLE * ROW_MULTIPLE,
    )


class Buffers:
    """A workspace, carved. With workspace None only the size is found."""

    def __init__(self, g: Geometry, limits: Limits, workspace: torch.Tensor | None) -> None:
        self.num_bytes = 0
        self.workspace = workspace
        self.keys = self._take((limits.piece_tokens, g.num_kv_heads, g.head_dim), g.dtype)
        self.values = self._take((limits.piece_tokens, g.num_kv_heads, g.head_dim_v), g.dtype)
        self.queries = self._take((limits.slice_tokens, g.num_heads, g.head_dim), g.dtype)
        self.partial = self._take((limits.slice_tokens, g.num_heads, g.head_dim_v), g.dtype)
        self.lse = [self._take((g.num_heads * limits.slice_tokens,), torch.float32) for _ in range(2)]

    def _take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = dtype.itemsize
        for n in shape:
            size *= n
        at, self.num_bytes = self.num_bytes, self.num_bytes + -(-size // ALIGNMENT) * ALIGNMENT
        if self.workspace is None:
            return torch.empty(0, dtype=dtype)
        return self.workspace[at : at + size].view(dtype).view(shape)


def workspace_size(g: Geometry, limits: Limits) -> int:
    return Buffers(g, limits, None).num_bytes


@dataclass
class Decode:
    """One dequant_kv call: tokens of consecutive sequences into the piece, and what of the chunk goes behind each."""

    seqs: tuple[int, int]  # rows [first, end) of the block table
    rows: int  # of the piece that are used
    # Rows [first, end) of the batch's keys and values, and the row of the piece where the first of them goes.
    raw: list[tuple[int, int, int]]
    first_tokens: torch.Tensor = field(init=False)
    token_start_loc: torch.Tensor = field(init=False)
    token_counts: torch.Tensor | None = field(init=False, default=None)


@dataclass
class Call:
    """One call of the stock kernel."""

    queries: tuple[int, int]  # rows [first, end) of the batch
    max_query_len: int
    max_key_len: int
    causal: bool
    decode: Decode | None  # None: the keys and values are rows of the batch
    keys: tuple[int, int]  # those rows; with a decode, Decode.raw says what of the batch is read
    merges: bool  # with what the calls before it left in the same rows of the output
    last: bool  # of these rows
    query_start_loc: torch.Tensor = field(init=False)
    key_start_loc: torch.Tensor = field(init=False)


@dataclass
class Slice:
    """Query rows [first, end) that are rotated together, and the calls that serve them."""

    queries: tuple[int, int]
    calls: list[Call]


@dataclass
class Plan:
    slices: list[Slice]


@dataclass(frozen=True)
class Unit:
    """Queries [begin, end) of one sequence's chunk, whose tokens [first, prefix) are compressed."""

    seq: int
    row: int  # of the chunk's first token, in the batch
    begin: int
    end: int
    first: int  # oldest token that a query of the unit sees
    prefix: int

    @property
    def decoded(self) -> int:
        return self.prefix - self.first

    @property
    def queries(self) -> tuple[int, int]:
        return self.row + self.begin, self.row + self.end


class _Tables:
    """The int32 tables of a plan: gathered on the host, copied to the device in one piece, and then views of it."""

    def __init__(self) -> None:
        self._values: list[int] = []
        self._views: list[tuple[Any, str, int, int]] = []

    def put(self, owner: Any, name: str, values: Sequence[int]) -> None:
        """Sets owner.name, once copied."""
        self._views.append((owner, name, len(self._values), len(values)))
        self._values += values

    def copy_to(self, device: torch.device) -> None:
        # From pinned memory, which torch keeps until the copy is done: the host does not wait for the device.
        host = torch.tensor(self._values, dtype=torch.int32, pin_memory=device.type == "cuda")
        table = host.to(device, non_blocking=True)
        for owner, name, at, count in self._views:
            setattr(owner, name, table[at : at + count])


def _starts(counts: Sequence[int]) -> list[int]:
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return starts


def make_plan(
    query_start_loc: Sequence[int],
    seq_lens: Sequence[int],
    first_seq: int,
    window: int,
    limits: Limits,
    device: torch.device,
) -> Plan | None:
    """A plan for sequences first_seq, first_seq + 1, ... of a batch, or None where a window with its chunk is larger than a piece.

    query_start_loc: rows of the batch, of these sequences; seq_lens: with the chunk. A sequence whose prefix and chunk fit into a
    piece together gets one causal call, with others beside it as long as they fit too. A longer one gets its last tokens with the
    chunk in a first call and the tokens before them, a piece at a time, in calls whose results are merged. A sequence without
    a (visible) prefix needs no piece.
    """
    planner = _Planner(window, limits)
    for i, length in enumerate(seq_lens):
        row, count = query_start_loc[i], query_start_loc[i + 1] - query_start_loc[i]
        if count > 0 and not planner.add(first_seq + i, row, count, length - count):
            return None
    planner.flush()
    planner.tables.copy_to(device)
    return Plan(planner.slices)


class _Planner:
    def __init__(self, window: int, limits: Limits) -> None:
        self.window, self.limits = window, limits
        self.tables = _Tables()
        self.slices: list[Slice] = []
        self._sliced = 0  # query rows of the last slice that may need its buffers; 0: the next unit begins another
        self._open: list[Unit] = []  # that go into one call

    def add(self, seq: int, row: int, count: int, prefix: int) -> bool:
        """A sequence behind the ones before. False if it cannot be served."""
        if prefix < 0:
            return False
        if self._first(0, prefix) == prefix:  # the whole chunk sees no prefix
            unit = Unit(seq, row, 0, count, prefix, prefix)
            if not (self._open and self._is_raw(self._open[-1])):
                self.flush()
                self.slices.append(Slice((row, row), []))
            self._extend_slice(row + count)
            self._open.append(unit)
            return True
        begin = 0
        while begin < count:
            if self._sliced in (0, self.limits.slice_tokens):
                self.flush()
                self.slices.append(Slice((row + begin, row + begin), []))
            end = min(count, begin + self.limits.slice_tokens - self._sliced)
            self._sliced += end - begin
            self._extend_slice(row + end)
            if not self._place(Unit(seq, row, begin, end, self._first(begin, prefix), prefix)):
                return False
            begin = end
        return True

    def flush(self) -> None:
        """Closes the slice."""
        self._close_call()
        self._sliced = 0

    def _first(self, begin: int, prefix: int) -> int:
        """The oldest prefix token that query `begin` of a chunk sees."""
        return min(prefix, max(0, prefix + begin - self.window + 1)) if self.window else 0

    @staticmethod
    def _is_raw(unit: Unit) -> bool:
        return unit.decoded == 0

    def _extend_slice(self, end: int) -> None:
        self.slices[-1].queries = (self.slices[-1].queries[0], end)

    def _place(self, unit: Unit) -> bool:
        """Into the open call, or into calls of its own."""
        piece = self.limits.piece_tokens
        if unit.decoded > 0 and unit.decoded + unit.end <= piece:
            used = sum(u.decoded + u.end for u in self._open)
            if self._open and (self._open[-1].seq != unit.seq - 1 or used + unit.decoded + unit.end > piece):
                self._close_call()
            self._open.append(unit)
            return True
        if unit.decoded > 0 and self.window:
            return False
        self._close_call()
        # Where the first call begins. If the chunk alone does not fit into a piece, all of the prefix is in the others.
        rest = unit.prefix
        if unit.decoded > 0 and unit.end <= piece:
            rest = min(rest, -(-(unit.prefix + unit.end - piece) // piece) * piece)
        pieces = [(at, min(at + piece, rest)) for at in range(unit.first, rest, piece)]
        self._call([replace(unit, first=rest)], last=not pieces)
        for first, end in pieces:
            self._piece(unit, first, end, last=end == rest)
        return True

    def _close_call(self) -> None:
        if self._open:
            self._call(self._open, last=True)
        self._open = []

    def _call(self, units: list[Unit], last: bool) -> None:
        """What is left of the units' prefixes, with their chunks behind."""
        queries, keys = [u.end - u.begin for u in units], [u.decoded + u.end for u in units]
        starts = _starts(keys)
        decode = None
        if not self._is_raw(units[0]):
            raw = [(u.row, u.row + u.end, at + u.decoded) for u, at in zip(units, starts, strict=False)]
            decode = Decode((units[0].seq, units[-1].seq + 1), sum(keys), raw)
            self.tables.put(decode, "first_tokens", [u.first for u in units])
            self.tables.put(decode, "token_start_loc", starts)
            self.tables.put(decode, "token_counts", [u.decoded for u in units])
        rows = (units[0].queries[0], units[-1].queries[1])
        chunk = (units[0].row, units[-1].row + units[-1].end)
        call = Call(rows, max(queries), max(keys), True, decode, chunk, False, last)
        self.tables.put(call, "query_start_loc", _starts(queries))
        self.tables.put(call, "key_start_loc", starts)
        self.slices[-1].calls.append(call)

    def _piece(self, unit: Unit, first: int, end: int, last: bool) -> None:
        """Prefix tokens [first, end), all of which all queries of the unit see."""
        queries = unit.end - unit.begin
        decode = Decode((unit.seq, unit.seq + 1), end - first, [])
        call = Call(unit.queries, queries, end - first, False, decode, (0, 0), True, last)
        self.tables.put(decode, "first_tokens", [first])
        self.tables.put(decode, "token_start_loc", [0, end - first])
        self.tables.put(call, "query_start_loc", [0, queries])
        self.tables.put(call, "key_start_loc", [0, end - first])
        self.slices[-1].calls.append(call)
