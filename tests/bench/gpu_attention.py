"""Attention over compressed pages on one NVIDIA GPU against bf16 and fp8 baselines of the same run.

    python tests/bench/gpu_attention.py --library build/lib/libtq_backend.so [--suite table,grid] [--json OUT] [--plots DIR]

Needs torch with CUDA; FA3, vLLM's in-tree TurboQuant and its cache write come from a vLLM wheel on PYTHONPATH, and what is not
there is one line "not available". Every time is the median of replays of a CUDA graph whose launches go through buffers larger
together than the L2 cache; baselines are read before and after ours, and the faster reading counts. Before a point is timed, one
sequence is compared with float32 attention over dequantized pages; a point that fails is INVALID and has no times.

Suites, and the seconds after which no further point of one is started (--budget-seconds bounds all together):
"""

from __future__ import annotations

import argparse
import faulthandler
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gpu_baselines as baselines
import torch
from gpu_abi import Backend
from gpu_ours import Ours
from gpu_report import COST, EXTRA, RATE, SPEEDUP, Row, lines, plot, summary, write_json, write_rows
from gpu_timing import Candidate, Graph, Shape, gpu_name, interleaved, plain_reads, pool_slots

SEED = 20261123
FORMAT = "turboquant_4bit_nc"
FORMATS = ("turboquant_k8v4", FORMAT, "turboquant_k3v4_nc", "turboquant_3bit_nc", "tq_8", "tq_k5v4", "tq_4")
ERROR_LIMIT = 1e-2  # of bf16 outputs, relative to a row's largest
# The prefill route rounds more often to bf16 (2^-9 each time): rotated queries and decoded keys, and the output at each merge.
ROUTE_ERROR_LIMIT = 2e-2
MEMORY = 60e9  # bytes; larger points are left out
BF16_BARS = {(1, 32768): 1.7, (1, 131072): 2.7, (8, 8192): 2.3, (8, 32768): 3.0, (64, 4096): 3.0, (64, 16384): 3.4}
# Query heads, KV heads, context as a multiple of the table's, and the part of the table's bar that is asked.
GROUPS = ((32, 8, 1, 1.0), (32, 4, 2, 0.9), (8, 8, 0.25, 0.9))
FORMAT_BARS = {("turboquant_k8v4", "64x16k"): 2.2, ("turboquant_3bit_nc", "64x16k"): 3.4}
PREFILL_BARS = {  # sequences, new tokens, prefix
    (1, 8192, 24576): 0.95,
    (1, 8192, 122880): 0.95,
    (4, 2048, 8192): 0.90,
    (1, 128, 24576): 0.87,
    (1, 512, 24576): 0.87,
    (1, 1024, 24576): 0.87,
    (1, 8192, 0): 1.0,
}


class DeviceLost(RuntimeError):
    """A kernel faulted: nothing more can run in this process."""


@dataclass
class Rival:
    name: str
    build: Callable[[], Candidate]
    measure: str = SPEEDUP
    bar: float | None = None


class Bench:
    def __init__(self, backend: Backend) -> None:
        self.ours, self.raw = Ours(backend), baselines.RawPool()
        self.reads = plain_reads()
        self.ceiling = max(nbytes / us / 1e3 for name, (nbytes, us) in self.reads.items() if "copy" not in name)
        self.failures = 0
        self._said: set[tuple[str, str]] = set()

    def clear(self) -> None:
        self.ours.clear()
        self.raw.clear()
        torch.cuda.empty_cache()

    def fa3(self, shape: Shape, dtype: torch.dtype = baselines.BF16, bar: float | None = None) -> Rival:
        name = "FA3 bf16" if dtype == baselines.BF16 else "FA3 fp8"
        return Rival(name, lambda: baselines.fa3(self.raw, shape, dtype), bar=bar)

    def cudnn(self, shape: Shape) -> Rival:
        name = "cuDNN bf16" if shape.query_len in (1, shape.context) else "cuDNN unmasked bf16"
        return Rival(name, lambda: baselines.cudnn(self.raw, shape))

    def cudnn_prefill(self, shape: Shape) -> Rival:
        if shape.query_len == shape.context:
            return self.cudnn(shape)
        return Rival("cuDNN in two parts bf16", lambda: baselines.cudnn_parts(self.raw, shape))

    def bf16(self, shape: Shape) -> list[Rival]:
        return [self.fa3(shape), self.cudnn(shape)]

    def itself(self, shape: Shape, name: str, bar: float | None = None) -> Rival:
        return Rival(f"ours, {name}", lambda: self.ours.attend(shape, FORMAT), COST, bar)

    def attend(
        self, suite: str, shape: Shape, rivals: list[Rival], bar: float | None = None, fmt: str = FORMAT
    ) -> list[Row]:
        """One point. bar: of the fastest bf16 rival; the others have their own."""
        prefill = shape.query_len > 16
        row = Row(
            suite, "prefill attention" if prefill else "decode attention", fmt, shape.name, shape.details, shape.brief,
            flops=shape.flops if prefill else 0, ceiling=self.ceiling, limit=ERROR_LIMIT, batch=shape.batch,
            context=shape.context, group=shape.heads // shape.kv_heads,
        )  # fmt: skip
        return self.point(row, lambda: self.ours.check(shape, fmt), lambda: self.ours.attend(shape, fmt), rivals, bar)

    def prefill(self, shape: Shape, bar: float | None) -> list[Row]:
        """One point of the route that the vLLM adapter takes, with the kernel that reads pages alone beside it."""
        row = Row(
            "prefill", "prefill attention", FORMAT, shape.name, shape.details, shape.brief, flops=shape.flops,
            ceiling=self.ceiling, limit=ROUTE_ERROR_LIMIT, batch=shape.batch, context=shape.context,
            group=shape.heads // shape.kv_heads,
        )  # fmt: skip
        own = Rival("ours, attend", lambda: self.ours.attend(shape, FORMAT))
        rivals = [self.fa3(shape), self.cudnn_prefill(shape), own]
        check, build = (lambda: self.ours.check_route(shape, FORMAT)), (lambda: self.ours.route(shape, FORMAT))
        return self.point(row, check, build, rivals, bar)

    def point(
        self,
        row: Row,
        check: Callable[[], float],
        build: Callable[[], Candidate],
        rivals: list[Rival],
        bar: float | None,
    ) -> list[Row]:
        try:
            torch.cuda.empty_cache()
            row.error = check()
            return self._timed(row, build(), rivals, bar) if row.valid else [row]
        except DeviceLost:
            raise
        except Exception as error:  # the other points go on
            self.failures += 1
            print(f"FAILED: {row.label}: {self.reason(error)}", flush=True)
            return []

    def reason(self, error: Exception) -> str:
        """One line of an error, once it is known that the device survived it."""
        text = f"{type(error).__name__}: {error}".splitlines()[0][:240]
        try:
            torch.cuda.synchronize()
        except Exception:
            raise DeviceLost(text) from error
        return text

    def _timed(self, row: Row, ours: Candidate, rivals: list[Rival], bar: float | None) -> list[Row]:
        present: list[tuple[Rival, Candidate, Graph]] = []
        for rival in rivals:
            try:
                candidate = rival.build()
                present.append((rival, candidate, Graph(candidate)))
            except Exception as error:  # it may need what is not installed, or not serve this shape
                said = (rival.name, self.reason(error))
                if said not in self._said:
                    print(f"{rival.name} not available at {row.label}: {said[1]}", flush=True)
                    self._said.add(said)
        row.nbytes = 0 if row.flops else ours.nbytes
        row.ours_us, readings = interleaved(Graph(ours), [graph for _, _, graph in present])
        rows = [
            replace(row, rival=r.name, rival_us=us, rival_bytes=c.nbytes, measure=r.measure, bar=r.bar)
            for (r, c, _), us in zip(present, readings, strict=True)
        ]
        native = [r for r in rows if r.rival.endswith("bf16")]
        if native and bar is not None:
            min(native, key=lambda r: r.rival_best).bar = bar
        return rows or [row]


Points = Iterator[list[Row]]


def table(bench: Bench) -> Points:
    for heads, kv_heads, factor, part in GROUPS:
        for (batch, context), bar in BF16_BARS.items():
            shape = Shape(batch, int(context * factor), heads, kv_heads)
            fp8_bar = (2.0 if batch * context >= 8 * 32768 else 1.5) if part == 1.0 else None
            rivals = [*bench.bf16(shape), bench.fa3(shape, baselines.FP8, fp8_bar)]
            yield bench.attend("table", shape, rivals, round(bar * part, 2))


def grid(bench: Bench) -> Points:
    for heads, kv_heads, _, _ in GROUPS:
        for batch in (1, 8, 32, 128):
            for context in (512, 1024, 4096, 16384, 32768):
                shape = Shape(batch, context, heads, kv_heads)
                slots = pool_slots(shape, shape.raw_bytes(2))
                if slots * kv_heads * shape.dim * 4 * 1.5 > MEMORY:  # ours is about half of it at most
                    print(f"{shape.name}, {shape.details}: left out, its caches need more than {MEMORY / 1e9:.0f} GB")
                    continue
                yield bench.attend("grid", shape, bench.bf16(shape))


def formats(bench: Bench) -> Points:
    for batch, context in ((8, 2048), (8, 8192), (8, 32768), (64, 16384), (1, 131072)):
        shape = Shape(batch, context)
        for fmt in FORMATS:
            yield bench.attend("formats", shape, bench.bf16(shape), FORMAT_BARS.get((fmt, shape.name)), fmt)


def dims(bench: Bench) -> Points:
    for dim in (64, 256, 512):
        shape = Shape(8, 32768, dim=dim)
        rivals = bench.bf16(shape)
        if dim > 256:  # FA3 has no kernel
            rivals.append(Rival("vLLM Triton bf16", lambda shape=shape: baselines.triton_paged(bench.raw, shape)))
        yield bench.attend("dims", shape, rivals, 2.5)


def spec(bench: Bench) -> Points:
    for batch, context in ((64, 16384), (8, 8192)):
        for tokens in (2, 4, 8):
            shape = Shape(batch, context, query_len=tokens)
            one = bench.itself(
                replace(shape, query_len=1), "1 query token", 1.3 if (batch, tokens) == (64, 4) else None
            )
            yield bench.attend("spec", shape, [one, *bench.bf16(shape)])


def pages(bench: Bench) -> Points:
    for page in (16, 32, 64, 128):
        shape = Shape(64, 16384, page=page)
        others = [] if page == 64 else [bench.itself(Shape(64, 16384), "pages of 64", 1.10 if page == 16 else None)]
        yield bench.attend("pages", shape, [*others, bench.fa3(shape)])


def window(bench: Bench) -> Points:
    shape = Shape(8, 131072, window=1024)
    yield bench.attend("window", shape, [bench.itself(Shape(8, 1024), "8x1k", 1.15), bench.fa3(shape)])


def ragged(bench: Bench) -> Points:
    draw = random.Random(SEED)
    for batch, least, most in ((64, 256, 65536), (8, 1024, 131072)):
        lens = tuple(round(math.exp(draw.uniform(math.log(least), math.log(most)))) for _ in range(batch))
        shape = Shape(batch, max(lens), lens=lens)
        equal = Shape(batch, sum(lens) // batch // 64 * 64)
        yield bench.attend("ragged", shape, [bench.fa3(shape), bench.itself(equal, f"each {equal.context}")])


def intree(bench: Bench) -> Points:
    for batch, context in BF16_BARS:
        shape = Shape(batch, context)
        rival = Rival("in-tree Triton", lambda shape=shape: baselines.in_tree(shape, FORMAT), bar=12.0)
        yield bench.attend("intree", shape, [rival])


def prefill(bench: Bench) -> Points:
    for (batch, new, prefix), bar in PREFILL_BARS.items():
        shape = Shape(batch, prefix + new, query_len=new)
        yield bench.prefill(shape, bar)
    for context, keep in ((32768, False), (131072, False), (131072, True)):
        shape = Shape(1, context)
        details = f"{shape.kv_heads} KV heads, head_dim {shape.dim}, keys {'left rotated' if keep else 'rotated back'}"
        row = Row(
            "prefill",
            "dequant_kv",
            FORMAT,
            shape.name,
            details,
            f"rotated={int(keep)}",
            RATE,
            ceiling=bench.ceiling,
            limit=ERROR_LIMIT,
        )
        check = lambda shape=shape: bench.ours.check_store(FORMAT, shape.kv_heads, shape.dim, shape.page)  # noqa: E731
        build = lambda shape=shape, keep=keep: bench.ours.dequant(shape, FORMAT, keep)  # noqa: E731
        yield bench.point(row, check, build, [], None)


def store(bench: Bench) -> Points:
    kv_heads, dim, page = 8, 128, 64
    for tokens in (1, 64, 8192):
        kv, slots, blocks = baselines.store_inputs(tokens, kv_heads, dim, page)
        measure, bar = (COST, 1.5) if tokens == 8192 else (EXTRA, 1.0)
        for fmt in FORMATS:
            rivals = [
                Rival(
                    "plain bf16 copy", lambda kv=kv: baselines.plain_copy(kv), measure, bar if fmt == FORMAT else None
                ),
                Rival(
                    "vLLM bf16 cache write",
                    lambda kv=kv, slots=slots, blocks=blocks: baselines.cache_write(kv, slots, blocks, page),
                    measure,
                ),
            ]
            details = f"{kv_heads} KV heads, head_dim {dim}"
            row = Row(
                "store", "store_kv", fmt, f"{tokens} tokens", details, "store", ceiling=bench.ceiling, limit=ERROR_LIMIT
            )
            check = lambda fmt=fmt: bench.ours.check_store(fmt, kv_heads, dim, page)  # noqa: E731
            build = lambda fmt=fmt, x=(kv, slots, blocks): bench.ours.store(*x, page, fmt)  # noqa: E731
            yield bench.point(row, check, build, rivals, None)


def read(bench: Bench) -> Points:
    for name, (nbytes, us) in bench.reads.items():
        yield [Row("read", "plain read", "", name, "", "", RATE, ours_us=us, nbytes=nbytes, ceiling=bench.ceiling)]


SUITES: dict[str, tuple[Callable[[Bench], Points], float, str]] = {
    "read": (read, 5, "plain reads, the measure of all shares of bandwidth"),
    "table": (table, 90, "the six shapes at GQA 4, 8, 1 against cuDNN, FA3 bf16, FA3 fp8"),
    "formats": (formats, 45, "all formats, against FA3 and cuDNN"),
    "dims": (dims, 20, "head_dim 64, 256, 512 at 8x32k"),
    "spec": (spec, 30, "2, 4, 8 query tokens"),
    "pages": (pages, 20, "pages of 16, 32, 64, 128 at 64x16k"),
    "window": (window, 10, "a window of 1024 over 8x128k"),
    "ragged": (ragged, 15, "log-uniform lengths"),
    "prefill": (
        prefill,
        40,
        "prefill and chunks over a prefix, by the adapter's route and by attend, against FA3 and cuDNN; dequant_kv",
    ),
    "store": (store, 20, "1, 64, 8192 tokens against a bf16 copy and vLLM's cache write"),
    "intree": (intree, 40, "vLLM's Triton TurboQuant decode at the table's shapes"),
    "grid": (grid, 120, "60 points of batch, context and GQA, against FA3 and cuDNN"),
}


def run_suite(name: str, bench: Bench, seconds: float, found: list[Row]) -> None:
    """Adds the suite's rows to found, point by point."""
    began, before = time.monotonic(), len(found)
    points, _, about = SUITES[name]
    print(f"\n== {name}: {about} (budget {seconds:.0f} s)", flush=True)
    faulthandler.dump_traceback_later(2 * seconds + 60, exit=True)  # a kernel that hangs
    try:
        for rows in points(bench):
            found += rows
            print("".join(f"{text}\n" for text in lines(rows)), end="", flush=True)
            if time.monotonic() - began > seconds:
                print(f"{name}: no further point, {seconds:.0f} s are over", flush=True)
                break
        bench.clear()
    except DeviceLost:
        raise
    except Exception as error:  # the other suites go on
        bench.failures += 1
        print(f"FAILED: suite {name}: {bench.reason(error)}", flush=True)
    finally:
        faulthandler.cancel_dump_traceback_later()
    print(f"-- {name}: {len(found) - before} rows in {time.monotonic() - began:.1f} s", flush=True)


def run(bench: Bench, args: argparse.Namespace, gpu: str) -> list[Row]:
    """All suites; what has been measured is on disk after each."""
    began = time.monotonic()
    rows: list[Row] = []
    for name in args.suite:
        left = args.budget_seconds - (time.monotonic() - began)
        if left <= 0:
            print(f"\n== {name}: not begun, {args.budget_seconds:.0f} s are over")
            continue
        try:
            run_suite(name, bench, min(left, SUITES[name][1]), rows)
        except DeviceLost as error:
            bench.failures += 1
            print(f"FAILED: the device is lost in suite {name}: {error}", flush=True)
            break
        finally:
            if args.json:
                write_json(args.json, rows, gpu)
            if args.plots:
                write_rows(args.plots, rows, gpu)
    return rows


def parsed() -> argparse.Namespace:
    def suites(text: str) -> list[str]:
        names = list(SUITES) if text == "all" else text.split(",")
        if unknown := [name for name in names if name not in SUITES]:
            raise argparse.ArgumentTypeError(f"no suite {', '.join(unknown)}; there are {', '.join(SUITES)}")
        return names

    about = "\n".join(f"  {name:8s} {seconds:4.0f} s  {text}" for name, (_, seconds, text) in SUITES.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}{about}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--library", type=Path, required=True, help="libtq_backend.so, its kernels beside it")
    parser.add_argument("--suite", type=suites, default=list(SUITES), help="names with commas, or all")
    parser.add_argument("--budget-seconds", type=float, default=math.inf, help="of all suites together")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--plots", type=Path, help="write plots, and rows for gpu_report.py, into this folder")
    return parser.parse_args()


def main() -> int:
    args = parsed()
    torch.manual_seed(SEED)
    began = time.monotonic()
    backend = Backend(args.library)
    gpu = gpu_name()
    try:
        import vllm.vllm_flash_attn.flash_attn_interface  # noqa: F401 - takes long; not to be part of a suite's time
    except Exception as error:  # said again by each baseline that needs it
        print(f"vLLM not available: {type(error).__name__}: {error}")
    bench = Bench(backend)
    print(
        f"{gpu}, torch {torch.__version__}, library build {backend.build_id}, plain read {bench.ceiling:.0f} GB/s, "
        f"ready after {time.monotonic() - began:.0f} s\n"
        "lines: format, batch x context, heads, head_dim, page, query tokens, window | ours | largest relative error | "
        "each baseline, its readings before and after ours, and the comparison with the faster one"
    )
    rows = run(bench, args, gpu)
    print("\n" + summary(rows))
    if args.plots and rows:
        try:
            print("\n".join(map(str, plot(args.plots, rows, gpu))))
        except Exception as error:  # the figures are there
            print(f"plots not drawn: {type(error).__name__}: {error}")
    return 1 if bench.failures or not all(row.valid for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
