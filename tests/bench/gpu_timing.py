"""Shapes, and times of launches on a GPU: CUDA graphs over buffers that are together larger than the L2 cache."""

from __future__ import annotations

import math
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from gpu_abi import DEVICE

ROTATE_BYTES = 400 << 20  # of all buffers together; an H200 has 60 MB of L2
MAX_SETS = 2048
MIN_GRAPH_US = 2000.0
REPLAYS = 7
BYTES_PER_US, FLOPS_PER_US = 4e6, 5e8  # of an H200, roughly: only for choosing how many launches a graph gets


@dataclass(frozen=True)
class Shape:
    """Sequences of `context` tokens in all, of which the last `query_len` are the queries; lens: ragged ones instead."""

    batch: int
    context: int
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    page: int = 64
    query_len: int = 1
    window: int = 0
    lens: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        context = f"{self.context // 1024}k" if self.context % 1024 == 0 else str(self.context)
        return f"ragged {self.batch}x<={context}" if self.lens else f"{self.batch}x{context}"

    @property
    def details(self) -> str:
        query = f", {self.query_len} query tokens" if self.query_len > 1 else ""
        window = f", window {self.window}" if self.window else ""
        return f"{self.heads}:{self.kv_heads} heads, head_dim {self.dim}, pages of {self.page}{query}{window}"

    @property
    def brief(self) -> str:
        query = f" q{self.query_len}" if self.query_len > 1 else ""
        window = f" w{self.window}" if self.window else ""
        return f"{self.heads}:{self.kv_heads} d{self.dim} p{self.page}{query}{window}"

    @property
    def seq_lens(self) -> tuple[int, ...]:
        return self.lens or (self.context,) * self.batch

    @property
    def pages(self) -> int:
        """Of the longest sequence."""
        return math.ceil(self.context / self.page)

    @property
    def pages_read(self) -> int:
        """Of one sequence, at most."""
        return min(self.pages, math.ceil((self.window + self.query_len) / self.page) + 1) if self.window else self.pages

    @property
    def slots(self) -> int:
        """Tokens that the pages of one set of sequences can hold."""
        return self.batch * self.pages * self.page

    @property
    def tokens_read(self) -> int:
        seen = self.window + self.query_len - 1 if self.window else self.context
        return sum(min(n, seen) for n in self.seq_lens)

    @property
    def num_queries(self) -> int:
        return self.batch * self.query_len

    def raw_bytes(self, element: int) -> int:
        return self.tokens_read * self.kv_heads * self.dim * 2 * element

    @property
    def flops(self) -> float:
        q = self.query_len
        pairs = sum(q * (n - q) + q * (q + 1) / 2 for n in self.seq_lens)
        return 4.0 * self.heads * self.dim * pairs

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """query_start_loc and seq_lens."""
        start = torch.arange(self.batch + 1, device=DEVICE, dtype=torch.int32) * self.query_len
        return start, torch.tensor(self.seq_lens, device=DEVICE, dtype=torch.int32)

    def queries(self, sets: int) -> torch.Tensor:
        return torch.randn(sets, self.num_queries, self.heads, self.dim, device=DEVICE, dtype=torch.bfloat16)


@dataclass
class Candidate:
    """One kernel at one shape: a call for each set of buffers, the bytes that a call moves, and a guess of its time."""

    calls: list[Callable[[], object]]
    nbytes: int
    guess_us: float


def gpu_name() -> str:
    """With the driver's version, which decides about figures as much as the card."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    return f"{torch.cuda.get_device_name()}, driver {driver}"


def guess_us(shape: Shape, nbytes: int) -> float:
    return max(5.0, nbytes / BYTES_PER_US, shape.flops / FLOPS_PER_US)


def buffer_sets(nbytes: int) -> int:
    return min(MAX_SETS, max(2, math.ceil(ROTATE_BYTES / nbytes)))


def pool_slots(shape: Shape, nbytes: int) -> int:
    """Tokens that a pool must hold: every set its own pages, unless one set alone is large or reads only a window of them."""
    return shape.slots if shape.window or nbytes >= ROTATE_BYTES else shape.slots * buffer_sets(nbytes)


def block_tables(shape: Shape, sets: int, blocks: int) -> torch.Tensor:
    """[sets, batch, pages] in random order. Where the pool is too small for sets of their own, they overlap, but each reads
    other pages than the one before: each sequence's last pages move on by as many as are read."""
    need = shape.batch * shape.pages
    order = torch.randperm(blocks, device=DEVICE).to(torch.int32)
    if sets * need <= blocks:
        return order[: sets * need].view(sets, shape.batch, shape.pages)
    rolled = [order[:need].roll(s * shape.pages_read) for s in range(sets)]
    return torch.stack(rolled).view(sets, shape.batch, shape.pages)


def slots_of(table: torch.Tensor, page: int, count: int) -> torch.Tensor:
    """Slots of the first `count` tokens of the sequence whose blocks are table: [blocks]."""
    token = torch.arange(count, device=table.device)
    return table.long()[token // page] * page + token % page


class Graph:
    """A candidate's calls in one CUDA graph, repeated until they take MIN_GRAPH_US."""

    def __init__(self, candidate: Candidate) -> None:
        calls = candidate.calls
        rounds = max(1, math.ceil(MIN_GRAPH_US / (len(calls) * candidate.guess_us)))
        self.launches = rounds * len(calls)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls[:2]:
                call()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for _ in range(rounds):
                for call in calls:
                    call()
        self.keep = calls

    def us(self, replays: int = REPLAYS, warm: int = 2) -> float:
        """Median microseconds per launch."""
        for _ in range(warm):
            self.graph.replay()
        torch.cuda.synchronize()
        times = []
        for _ in range(replays):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            self.graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / self.launches)
        return statistics.median(times)


def interleaved(ours: Graph, rivals: Sequence[Graph]) -> tuple[float, list[list[float]]]:
    """Ours once, and every rival before and after it."""
    before = [rival.us() for rival in rivals]
    mine = ours.us()
    after = [rival.us() for rival in rivals]
    return mine, [list(pair) for pair in zip(before, after, strict=True)]


def plain_reads() -> dict[str, tuple[int, float]]:
    """Bytes and microseconds of plain reading, and of reading and writing, of more than 1 GB."""
    data = torch.ones(1 << 30, device=DEVICE, dtype=torch.float32)
    half = data.numel() // 2
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "torch.sum of 4.3 GB": (data.nbytes, lambda: torch.sum(data)),
        "torch.sum of 1.1 GB": (data.nbytes // 4, lambda: torch.sum(data[: half // 2])),
        "copy of 2.1 GB, read and write": (data.nbytes, lambda: torch.neg(data[:half], out=data[half:])),
    }
    try:
        import gpu_read

        sink, words = gpu_read.new_sink(DEVICE), data.view(torch.int32)
        gpu_read.read(words, sink)
        calls["read of 4.3 GB, Triton"] = (data.nbytes, lambda: gpu_read.read(words, sink))
    except Exception as error:  # torch.sum is the measure then
        print(f"read by Triton not available: {type(error).__name__}: {error}".splitlines()[0])
    return {
        name: (nbytes, Graph(Candidate([call], nbytes, nbytes / BYTES_PER_US)).us())
        for name, (nbytes, call) in calls.items()
    }
