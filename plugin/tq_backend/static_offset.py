"""What one fixed vector leaves of a key bias that the rotary embedding turns: from the bias and a model's configuration. No torch, no engine.

A bias b of the key projection is R(j) b in the key of token j (vllm_adapter/key_offsets.py takes its mean c from the keys). A pair of
dimensions turns by its own angle each token, so over n tokens its mean is |sin(n a / 2) / (n sin(a / 2))| of it: all where it hardly turns,
nothing where it turns often. What is left is in every key still, and other for each token.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tq_backend.model_text import rope_parameters

# Positions that c is the mean of. One vector stops to fit a bias that turns: with c, attention of Qwen2.5-1.5B's layer 0 has a KL of 0.03
# over 4,096 tokens, 0.14 over 32,768 and 1.8 over 131,072. So a longer model's c is the best one for contexts up to here.
MOST_POSITIONS = 32_768
# model_type of those that know positions by a learned embedding or by ALiBi: their keys' bias does not turn.
UNTURNED = frozenset(("biogpt", "bloom", "gpt2", "gpt_bigcode", "jais", "mpt", "opt", "xglm"))
# Pairs are neighbours, and not a dimension of the first half with one of the second.
INTERLEAVED = frozenset(("chatglm", "codegen", "cohere", "cohere2", "glm", "glm4", "gptj"))
WITH_SINKS = frozenset(("gpt_oss",))
BASES = ("rope_theta", "rotary_emb_base", "rotary_embedding_base")
FRACTIONS = ("partial_rotary_factor", "rotary_pct")


@dataclass(frozen=True)
class Rotary:
    """angles: radians per token, of each pair of dimensions."""

    angles: tuple[float, ...] = ()
    interleaved: bool = False
    positions: int = 1


def rotary_of(text: Mapping[str, Any], head_dim: int, positions: int) -> Rotary | None:
    """Of a language model's configuration served up to so many positions; None where no offset is taken, since sinks and soft caps see what
    is taken from all scores. A configuration that scales positions turns more slowly than
    this, and one with several embeddings is taken by the fastest, so that no less is left than is said."""
    kind = text.get("model_type")
    if kind in WITH_SINKS or text.get("attn_logit_softcapping"):
        return None
    if kind in UNTURNED or text.get("alibi"):
        return Rotary(positions=positions)
    places = [*rope_parameters(text), text]

    def given(names: Sequence[str]) -> list[float]:
        values = [place[name] for place in places for name in names if place.get(name) is not None]
        return [float(x) for x in values if isinstance(x, int | float) and math.isfinite(x) and x > 0]

    base = min(given(BASES), default=10_000.0)
    width = given(("rotary_dim",))
    fraction = width[0] / head_dim if width else max(given(FRACTIONS), default=0.5 if kind == "chatglm" else 1.0)
    pairs = max(1, min(int(head_dim * fraction), head_dim) // 2)
    return Rotary(tuple(base ** (-i / pairs) for i in range(pairs)), kind in INTERLEAVED, positions)


def mean_turn(angle: float, positions: int) -> complex:
    """Mean of exp(i j angle) over j in [0, positions)."""
    half = math.sin(angle / 2)
    if abs(half) < 1e-12:
        return 1
    return cmath.exp(0.5j * (positions - 1) * angle) * math.sin(positions * angle / 2) / (positions * half)


def left_of(bias: Sequence[float], rotary: Rotary | None) -> float:
    """Root of the mean, over the served positions, of |R(j) b - c|^2 of one head."""
    if rotary is None:
        return math.hypot(*bias)
    pairs, total = len(rotary.angles), 0.0
    for i, angle in enumerate(rotary.angles):
        x, y = (bias[2 * i], bias[2 * i + 1]) if rotary.interleaved else (bias[i], bias[pairs + i])
        c = mean_turn(angle, min(rotary.positions, MOST_POSITIONS))
        here = mean_turn(angle, rotary.positions)
        total += (x * x + y * y) * (1 + abs(c) ** 2 - 2 * (here * c.conjugate()).real)
    return math.sqrt(max(total, 0.0))
