"""What `tq eval` finds out about one cache on one text: an entry of its results file, and a line of its table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from tq_backend.cli.scores import Paired, Score, standard_error, upper95
from tq_backend.cli.tasks import GREEDY_TOKENS


@dataclass
class Row:
    """One cache on one text: an entry of the results file."""

    model: str
    text: str
    cache: str
    note: str
    skip_layers: list[int | str] | None  # None: those that the format has by default
    bytes_per_token: int
    windows: int
    window: int
    kl: float
    kl_se: float | None
    kl_upper95: float | None
    perplexity: float
    top1: float
    top1_se: float | None
    window_kl: list[float]
    window_nll: list[float]
    window_top1: list[float]
    against: Paired | None = None
    decode_kl: float | None = None  # of the first window, token by token, and the same positions by prefill
    decode_prefill_kl: float | None = None
    needles: dict[str, str] = field(default_factory=dict)  # length: keys found of keys hidden
    greedy: float | None = None  # mean number of tokens before the first that differs from bf16's
    bar: str = ""


def row_of(
    model: str,
    text: str,
    cache: str,
    num_bytes: int,
    window: int,
    scores: list[Score],
    note: str = "",
    skip_layers: Sequence[int | str] | None = (),
) -> Row:
    """scores: of each window."""
    kl, nll, top1 = ([getattr(score, name) for score in scores] for name in ("kl", "nll", "top1"))
    error = standard_error(kl)
    return Row(
        model=model,
        text=text,
        cache=cache,
        note=note,
        skip_layers=skip_layers if skip_layers is None else list(skip_layers),
        bytes_per_token=num_bytes,
        windows=len(scores),
        window=window,
        kl=fmean(kl),
        kl_se=error,
        kl_upper95=upper95(fmean(kl), error, len(kl)),
        perplexity=math.exp(fmean(nll)),
        top1=fmean(top1),
        top1_se=standard_error(top1),
        window_kl=kl,
        window_nll=nll,
        window_top1=top1,
    )


def plus_minus(value: float | None, style: str) -> str:
    return "" if value is None else f" +-{value:{style}}"


HEAD = f"{'text':8s} {'cache':20s} {'bytes/token':>11s} {'mean KL, nat':>19s} {'perplexity':>10s} {'same top 1':>15s}"


def line_of(row: Row) -> str:
    text = f"{row.text[-8:]:8s} {row.cache:20s} {row.bytes_per_token:11d} {f'{row.kl:.5f}' + plus_minus(row.kl_se, '.5f'):>19s}"
    text += f" {row.perplexity:10.4f} {f'{row.top1:.2%}' + plus_minus(row.top1_se, '.2%'):>15s}"
    more = [row.note] if row.note else []
    if row.against is not None and row.against.format != row.cache:
        limit = "" if row.against.ratio_upper95 is None else f", with 95 % below {row.against.ratio_upper95:.3g}"
        more.append(f"{row.against.ratio:.3g} times {row.against.format}'s KL{limit}")
    if row.decode_kl is not None:
        more.append(f"decode's KL {row.decode_kl:.5f}, prefill's of the same window {row.decode_prefill_kl:.5f}")
    more += [f"keys found at {length} tokens: {found}" for length, found in row.needles.items()]
    if row.greedy is not None:
        more.append(f"greedy: first {row.greedy:.0f} of {GREEDY_TOKENS} tokens as bf16's")
    return "  ".join([text, *(["; ".join(more)] if more else [])])
