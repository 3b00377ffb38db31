"""A plot of bytes per token against KL, as SVG, from what `tq eval --json` wrote: a panel per model, a colour per text, and a line
through the caches that no other one of the plot beats in both."""

from __future__ import annotations

import json
import math
from itertools import groupby
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

Rows = list[dict[str, Any]]
WIDTH, HEIGHT = 460, 340  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 62, 24, 34, 46
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")
NEEDED = ("model", "text", "cache", "bytes_per_token", "kl")


def read_rows(files: list[Path]) -> Rows:
    """Raises ValueError for a file that `tq eval` did not write."""
    rows: Rows = []
    for file in files:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"--from {file}: {error}") from error
        if not isinstance(found, list) or not all(isinstance(r, dict) and all(n in r for n in NEEDED) for r in found):
            raise ValueError(f"--from {file} is no list of what `tq eval --json` writes: {', '.join(NEEDED)} and more")
        rows += found
    return rows


def front(points: Rows) -> Rows:
    """By bytes, those that no point of fewer or equal bytes beats."""
    best: Rows = []
    for row in sorted(points, key=lambda row: (row["bytes_per_token"], row["kl"])):
        if not best or row["kl"] < best[-1]["kl"]:
            best.append(row)
    return best


def label(x: float, y: float, text: str, anchor: str = "start", colour: str = "#333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'


def panel(model: str, rows: Rows, texts: list[str], at: int) -> list[str]:
    points = [row for row in rows if row["kl"] > 0]
    if not points:
        raise ValueError(f"there is no KL above 0 for {model}: nothing to plot")
    most = 1.05 * max(row["bytes_per_token"] for row in rows)
    low = math.floor(math.log10(min(row["kl"] for row in points)))
    high = max(math.ceil(math.log10(max(row["kl"] for row in points))), low + 1)

    def place(num_bytes: float, kl: float) -> tuple[float, float]:
        share = (math.log10(kl) - low) / (high - low)
        return at + LEFT + (WIDTH - LEFT - RIGHT) * num_bytes / most, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    (left, bottom), (right, top) = place(0, 10**low), place(most, 10**high)
    out = [
        label((left + right) / 2, 18, model, "middle"),
        label((left + right) / 2, HEIGHT - 8, "bytes per token", "middle"),
        f'<g transform="rotate(-90 {at + 12} {(top + bottom) / 2})">'
        + label(at + 12, (top + bottom) / 2, "mean KL to bf16, nat", "middle")
        + "</g>",
    ]
    legend = right - 6  # down where many bytes lose little: no cache stands there
    for power in range(low, high + 1):
        _, y = place(0, 10**power)
        out += [f'<line x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#ddd"/>']
        out += [label(left - 6, y + 4, f"{10.0**power:g}", "end")]
    step = 10 ** math.floor(math.log10(most))
    step = step if most / step >= 4 else step / 4
    for i in range(int(most / step) + 1):
        x, _ = place(i * step, 10**low)
        out += [f'<line x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{top}" stroke="#eee"/>']
        out += [label(x, bottom + 16, f"{i * step:g}", "middle")]
    if native := [row["bytes_per_token"] for row in rows if row["kl"] == 0]:
        x, _ = place(native[0], 10**low)
        out += [f'<line x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{top}" stroke="#999" stroke-dasharray="4"/>']
        out += [label(x - 4, top + 12, "bf16", "end")]
        legend = x - 6
    for number, text in enumerate(texts):
        colour = COLOURS[number % len(COLOURS)]
        own = [row for row in points if row["text"] == text]
        line = " ".join("{:.1f},{:.1f}".format(*place(row["bytes_per_token"], row["kl"])) for row in front(own))
        out += [
            f'<polyline points="{line}" fill="none" stroke="{colour}"/>',
            label(legend, bottom - 10 - 14 * number, text, "end", colour),
        ]
        for row in own:
            x, y = place(row["bytes_per_token"], row["kl"])
            out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>']
            out += [label(x + 6, y + 4, row["cache"].removeprefix("turboquant_"), colour=colour)]
    return out


def svg(rows: Rows) -> str:
    ordered = sorted(rows, key=lambda row: row["model"])
    texts = sorted({row["text"] for row in rows})
    panels = [list(group) for _, group in groupby(ordered, key=lambda row: row["model"])]
    body = [line for i, group in enumerate(panels) for line in panel(group[0]["model"], group, texts, i * WIDTH)]
    size = f'width="{WIDTH * len(panels)}" height="{HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *body, "</svg>"]) + "\n"


def write(path: Path, rows: Rows) -> None:
    if not rows:
        raise ValueError("there is nothing to plot")
    path.write_text(svg(rows), encoding="utf-8")
