"""Predictions with a compressed cache against those with a native one: sums over a window, and statistics over windows.

Windows are the unit of every standard error: positions of one window share its text and are no independent samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Protocol

import torch

POSITIONS_AT_ONCE = 128  # of a vocabulary of 262,144: 134 MB of float32, and three of them at a time
# Student's t: what a mean lies below with 95 %, in standard errors, by degrees of freedom from 1 on.
T95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761, 1.753)


class Predictor(Protocol):
    def log_probs(self, hidden: torch.Tensor) -> torch.Tensor: ...


@dataclass
class Score:
    """Means over the positions of a window."""

    kl: float  # KL(native || compressed), nat
    nll: float  # negative log likelihood of the text's next token
    top1: float  # share of positions with the same most likely token


def compare(
    engine: Predictor,
    base: torch.Tensor,
    hidden: torch.Tensor,
    targets: list[int],
    tick: Callable[[int], object] = lambda _: None,
) -> Score:
    """base, hidden: [positions, hidden size]. targets may be one shorter. tick is told of positions as they are done."""
    kl = nll = same = 0.0
    for start in range(0, len(hidden), POSITIONS_AT_ONCE):
        part = slice(start, start + POSITIONS_AT_ONCE)
        q = engine.log_probs(hidden[part])
        if base is hidden:  # the native cache against itself
            same += len(q)
        else:
            p = engine.log_probs(base[part])
            kl += torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True).item()
            same += (q.argmax(-1) == p.argmax(-1)).sum().item()
        want = torch.tensor(targets[part])
        nll -= q[torch.arange(len(want)), want].sum().item()
        tick(len(q))
    return Score(kl / len(hidden), nll / len(targets), same / len(hidden))


def standard_error(values: list[float]) -> float | None:
    """Of their mean; None of a single window, which says nothing about others."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def upper95(mean: float, error: float | None, windows: int) -> float | None:
    return None if error is None else mean + T95[min(windows - 1, len(T95)) - 1] * error


@dataclass
class Paired:
    """A format against another one on the same windows: their texts' difficulty cancels."""

    format: str
    difference: float  # of the mean KL
    difference_se: float | None
    ratio: float
    ratio_upper95: float | None  # a bound that the ratio lies below with 95 %


def paired(name: str, base: list[float], ours: list[float]) -> Paired:
    differences = [a - b for a, b in zip(ours, base, strict=True)]
    ratio = fmean(ours) / fmean(base)
    residual = standard_error([a - ratio * b for a, b in zip(ours, base, strict=True)])
    error = None if residual is None else residual / fmean(base)
    return Paired(name, fmean(differences), standard_error(differences), ratio, upper95(ratio, error, len(ours)))
