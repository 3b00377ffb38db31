"""Rows of tests/bench/gpu_attention.py: printed tables, the JSON list of figures, and plots.

python tests/bench/gpu_report.py ROWS [--json OUT] [--plots DIR]     again from the rows that a run left in its plots folder
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Of this tree, installed or not: it needs nothing compiled.
RESULTS = Path(__file__).resolve().parents[2] / "plugin" / "tq_backend" / "cli" / "results.py"
_spec = importlib.util.spec_from_file_location("tq_backend_results", RESULTS)
results = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = results
_spec.loader.exec_module(results)

SPEEDUP, COST, EXTRA, RATE = "x", "x time", " us more", " GB/s"  # what a row's value is
UNITS = {SPEEDUP: "times as fast", COST: "times the time", EXTRA: "us more", RATE: "GB/s"}
ROWS_FILE = "rows.json"


@dataclass
class Row:
    suite: str
    operation: str  # "decode attention", ...
    format: str
    shape: str  # "64x16k"
    details: str
    brief: str = ""  # the details in a few letters
    measure: str = SPEEDUP
    rival: str = ""  # name; none: the row is ours alone
    rival_us: list[float] = field(default_factory=list)  # before and after ours
    ours_us: float = math.nan
    nbytes: int = 0  # that one call of ours reads of compressed pages (reads and writes, for stores and dequantization)
    rival_bytes: int = 0
    flops: float = 0.0  # of one call, where they are what bounds it
    ceiling: float = 0.0  # GB/s of a plain read, in the same run
    bar: float | None = None
    error: float = 0.0
    limit: float = math.inf  # of the error
    batch: int = 0
    context: int = 0
    group: int = 0  # query heads per KV head

    @property
    def valid(self) -> bool:
        return self.error <= self.limit

    @property
    def rival_best(self) -> float:
        """The faster reading: the harder one to beat."""
        return min(self.rival_us, default=math.nan)

    @property
    def gb_s(self) -> float:
        return self.nbytes / self.ours_us / 1e3

    @property
    def share(self) -> float:
        return self.gb_s / self.ceiling if self.ceiling else math.nan

    @property
    def value(self) -> float:
        if self.measure == RATE:
            return self.gb_s
        if self.measure == EXTRA:
            return self.ours_us - self.rival_best
        ratio = self.rival_best / self.ours_us
        return ratio if self.measure == SPEEDUP else 1 / ratio

    @property
    def met(self) -> bool:
        """Whether the bar is reached; true without one."""
        if self.bar is None:
            return True
        if not self.valid or math.isnan(self.value):
            return False
        return self.value >= self.bar if self.measure in (SPEEDUP, RATE) else self.value <= self.bar

    @property
    def bar_text(self) -> str:
        if self.bar is None:
            return ""
        return f"{'>=' if self.measure in (SPEEDUP, RATE) else '<='} {self.bar:g}"

    @property
    def where(self) -> str:
        return " ".join(filter(None, [self.format, ", ".join(filter(None, [self.shape, self.details]))]))

    @property
    def speed(self) -> str:
        if self.flops:
            return f"{self.flops / self.ours_us / 1e6:.0f} TFLOP/s"
        share = f", {self.share:.0%} of a plain read" if self.ceiling else ""
        return f"{self.gb_s:.0f} GB/s{share}" if self.nbytes else ""

    @property
    def label(self) -> str:
        """Short, for a line of a table."""
        return " ".join(filter(None, [self.format.removeprefix("turboquant_"), self.shape, self.brief]))

    @property
    def compared(self) -> str:
        if not self.rival and self.measure != RATE:
            return ""
        rival = f"{self.rival} {'/'.join(f'{us:.1f}' for us in self.rival_us)}: " if self.rival else ""
        verdict = f" ({self.bar_text} {'ok' if self.met else 'MISSED'})" if self.bar_text else ""
        return f"{rival}{self.value:.2f}{self.measure}{verdict}" if self.rival or verdict else ""

    def figure(self) -> Any:
        name = f"{self.operation}, {self.where}" + (f", against {self.rival}" if self.rival else "")
        if not self.valid:
            bar = f"<= {self.limit:g}"
            return results.Figure(
                f"INVALID, largest relative error: {name}", min(self.error, 1e9), "1", bar, "float32 attention"
            )
        ours = ", ".join(filter(None, [f"ours {self.ours_us:.2f} us", self.speed]))
        if not self.rival:
            alone = (round(self.gb_s), UNITS[RATE]) if self.measure == RATE else (round(self.ours_us, 2), "us")
            return results.Figure(name, *alone, self.bar_text, ours)
        readings = " and ".join(f"{us:.2f}" for us in self.rival_us)
        return results.Figure(
            name, round(self.value, 3), UNITS[self.measure], self.bar_text, f"{self.rival} {readings} us; {ours}"
        )


def line(rows: list[Row]) -> str:
    """One point, whose rows are ours against one rival each."""
    row = rows[0]
    start = f"{row.label:36s}"
    if not row.valid:
        return f"{start} INVALID: largest relative error {row.error:.2e}, allowed {row.limit:g}"
    error = f"error {row.error:.1e}" if row.limit < math.inf else ""
    speed = row.speed.removesuffix(" of a plain read")
    parts = [f"{start} {row.ours_us:9.2f} us", speed, error, *(row.compared for row in rows)]
    return " | ".join(filter(None, parts))


def lines(rows: list[Row]) -> list[str]:
    """Of all points, in the rows' order."""
    points: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        points.setdefault((row.suite, row.operation, row.label), []).append(row)
    return [line(point) for point in points.values()]


def write_rows(folder: Path, rows: list[Row], gpu: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"gpu": gpu, "rows": [asdict(row) for row in rows]}, indent=0)
    (folder / ROWS_FILE).write_text(text + "\n")


def read_rows(path: Path) -> tuple[list[Row], str]:
    read = json.loads(path.read_text())
    return [Row(**row) for row in read["rows"]], read["gpu"]


def write_json(path: Path, rows: list[Row], gpu: str) -> None:
    results.write_results(path, [row.figure() for row in rows], gpu)


def summary(rows: list[Row]) -> str:
    """What a reader wants last: bars missed, points where ours is slower, rows that are not valid."""
    barred = [row for row in rows if row.bar is not None]
    slower = [row for row in rows if row.suite == "grid" and row.valid and row.rival and row.value < 1]
    parts = {
        "bars missed": [f"{row.label}: {row.compared}" for row in barred if row.valid and not row.met],
        "slower than a bf16 baseline": [f"{row.label} {row.ours_us:.2f} us: {row.compared}" for row in slower],
        "not valid": [line([row]) for row in rows if not row.valid],
    }
    text = [f"{len(rows)} rows, {len(barred)} bars, {sum(row.met for row in barred)} of them reached"]
    for title, found in parts.items():
        if found:
            text += [f"{title}, {len(found)}:"] + [f"  {one}" for one in found]
    return "\n".join(text)


# Plots. Points of one shape against several rivals become one: against the fastest bf16 rival.


def best_points(rows: Iterable[Row]) -> list[Row]:
    best: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        if row.measure != SPEEDUP or "bf16" not in row.rival or not row.valid or not row.context:
            continue
        key = (row.format, row.shape, row.details)
        if key not in best or row.rival_best < best[key].rival_best:
            best[key] = row
    return sorted(best.values(), key=lambda row: row.context)


def plot(folder: Path, rows: list[Row], gpu: str) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plots = (
        ("speed_by_format", _speed_by_format, 2),
        ("speed_by_batch", _speed_by_batch, 3),
        ("bandwidth", _bandwidth, 1),
    )
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw, panels in plots:
        figure, axes = plt.subplots(1, panels, figsize=(5.2 * panels + (2 if panels == 1 else 0), 4.4), squeeze=False)
        if draw(axes[0], rows):
            figure.suptitle(gpu)
            figure.tight_layout()
            figure.savefig(folder / f"{name}.png", dpi=110)
            written.append(folder / f"{name}.png")
        plt.close(figure)
    return written


def _contexts(axis, points: Iterable[Row]) -> None:
    found = sorted({row.context for row in points})
    axis.set_xscale("log", base=2)
    axis.set_xticks(found, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in found])
    axis.set_xlabel("context, tokens")
    axis.grid(alpha=0.3)


def _speed_by_format(axes, rows: list[Row]) -> bool:
    """Times and speedups over the context at batch 8, one line per format (suite formats)."""
    points = [row for row in best_points(r for r in rows if r.suite == "formats") if row.batch == 8]
    if not points:
        return False
    for name in sorted({row.format for row in points}):
        line = [row for row in points if row.format == name]
        axes[0].plot([r.context for r in line], [r.ours_us for r in line], "o-", label=name)
        axes[1].plot([r.context for r in line], [r.value for r in line], "o-", label=name)
    fastest = {row.context: row.rival_best for row in points}
    axes[0].plot(list(fastest), list(fastest.values()), "k--", label="fastest bf16 baseline")
    axes[0].set(yscale="log", ylabel="microseconds per launch", title="decode attention, batch 8, GQA 4")
    axes[1].axhline(1, color="black", linestyle="--")
    axes[1].set(ylabel="times as fast as bf16", title="against the fastest bf16 baseline", ylim=(0, None))
    for axis in axes:
        _contexts(axis, points)
        axis.legend(fontsize=8)
    return True


def _speed_by_batch(axes, rows: list[Row]) -> bool:
    """Speedups over the context, one panel per GQA group and one line per batch (suite grid)."""
    points = best_points(r for r in rows if r.suite == "grid")
    if not points:
        return False
    for axis, group in zip(axes, (1, 4, 8), strict=True):
        panel = [row for row in points if row.group == group]
        for batch in sorted({row.batch for row in panel}):
            line = [row for row in panel if row.batch == batch]
            axis.plot([r.context for r in line], [r.value for r in line], "o-", label=f"batch {batch}")
        axis.axhline(1, color="black", linestyle="--")
        axis.set(title=f"GQA {group}", ylabel="times as fast as bf16", ylim=(0, None))
        _contexts(axis, panel)
        if panel:
            axis.legend(fontsize=8)
    return True


def _bandwidth(axes, rows: list[Row]) -> bool:
    """Share of a plain read's speed over the bytes read, of every decode point, and of the bf16 baselines."""
    points = [row for row in best_points(rows) if row.operation == "decode attention" and row.ceiling]
    if not points:
        return False
    axis = axes[0]
    for name in sorted({row.format for row in points}):
        mine = [row for row in points if row.format == name]
        axis.plot([r.nbytes / 1e6 for r in mine], [100 * r.share for r in mine], "o", label=name, alpha=0.7)
    baseline = [(r.rival_bytes / 1e6, 100 * r.rival_bytes / r.rival_best / 1e3 / r.ceiling) for r in points]
    axis.plot([x for x, _ in baseline], [y for _, y in baseline], "kx", label="fastest bf16 baseline", alpha=0.5)
    axis.set(xscale="log", xlabel="MB of cache read", ylabel="share of a plain read's speed, %", ylim=(0, 105))
    axis.set_title("bandwidth of decode attention")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plots", type=Path)
    args = parser.parse_args()
    rows, gpu = read_rows(args.rows)
    print("\n".join([*lines(rows), summary(rows)]))
    if args.json:
        write_json(args.json, rows, gpu)
    if args.plots:
        print("\n".join(map(str, plot(args.plots, rows, gpu))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
