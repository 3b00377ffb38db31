"""What one fixed vector leaves of a key bias that the rotary embedding turns: from the bias and a model's configuration. No torch, no engine.

A bias b of the key projection is R(j) b in the key of token j, and its mean c is taken from the keys (vllm_adapter/key_offsets.py). A pair
of dimensions turns by its own angle each token, so over n tokens its mean is |sin(n a / 2) / (n sin(a / 2))| of it: all where it hardly turns,
nothing where it turns often. What is left is in every key still, and other for each token.

Most contexts are shorter than what a model allows, and every context has the early positions. So c is the mean over contexts of 512, 1024,
2048, ... tokens, each length counted once: at layer 2 of Qwen2.5-Coder 0.5B (bias 128) it leaves 14 over 2,048 tokens, where the
plain mean over 32,768 leaves 25, and 23 instead of 18 over 32,768. It depends on the model alone, not on how long an engine serves it, so
that engines of one model may read each other's pages.
"""

from __future__ import annotations

import cmath
import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tq_backend.model_text import rope_parameters

# The longest of those contexts. One vector stops to fit a bias that turns: with the plain mean, attention of Qwen2.5-1.5B's layer 0 has a KL
# of 0.03 over 4,096 tokens, 0.14 over 32,768 and 1.8 over 131,072. So a longer model's c is the best one for contexts up to here.
SHORTEST, MOST_POSITIONS = 512, 32_768
# model_type of those that know positions by a learned embedding or by ALiBi: their keys' bias does not turn.
UNTURNED = frozenset(("biogpt", "bloom", "gpt2", "gpt_bigcode", "jais", "mpt", "opt", "xglm"))
# Pairs are neighbours, and not a dimension of the first half with one of the second.
INTERLEAVED = frozenset(("chatglm", "codegen", "cohere", "cohere2", "glm", "glm4", "gptj"))
WITH_SINKS = frozenset(("gpt_oss",))
BASES = ("rope_theta", "rotary_emb_base", "rotary_embedding_base")
FRACTIONS = ("partial_rotary_factor", "rotary_pct")


@dataclass(frozen=True)
class Rotary:
    """angles: radians per token, of each pair of dimensions; positions: that the model is made for; served: by the engine."""

    angles: tuple[float, ...] = ()
    interleaved: bool = False
    positions: int = 1
    served: int = 1


def context_lengths(longest: int) -> list[int]:
    """Doubling, and the longest."""
    found = [longest]
    while found[0] > SHORTEST:
        found.insert(0, 1 << (found[0] - 1).bit_length() - 1)
    return found


def rotary_of(text: Mapping[str, Any], head_dim: int, served: int) -> Rotary | None:
    """Of a language model's configuration served up to so many tokens; None where no offset is taken, since sinks and soft caps see what
    is taken from all scores. A configuration that scales positions turns more slowly than
    this, and one with several embeddings is taken by the fastest, so that no less is left than is said."""
    kind = text.get("model_type")
    if kind in WITH_SINKS or text.get("attn_logit_softcapping"):
        return None
    if kind in UNTURNED or text.get("alibi"):
        return Rotary(served=served)
    places = [*rope_parameters(text), text]

    def given(names: Sequence[str]) -> list[float]:
        values = [place[name] for place in places for name in names if place.get(name) is not None]
        return [float(x) for x in values if isinstance(x, int | float) and math.isfinite(x) and x > 0]

    base = min(given(BASES), default=10_000.0)
    width = given(("rotary_dim",))
    fraction = width[0] / head_dim if width else max(given(FRACTIONS), default=0.5 if kind == "chatglm" else 1.0)
    pairs = max(1, min(int(head_dim * fraction), head_dim) // 2)
    own = text.get("max_position_embeddings")
    positions = own if isinstance(own, int) and own > 0 else served
    return Rotary(tuple(base ** (-i / pairs) for i in range(pairs)), kind in INTERLEAVED, positions, served)


def mean_turn(angle: float, positions: int) -> complex:
    """Mean of exp(i j angle) over j in [0, positions)."""
    half = math.sin(angle / 2)
    if abs(half) < 1e-12:
        return 1
    return cmath.exp(0.5j * (positions - 1) * angle) * math.sin(positions * angle / 2) / (positions * half)


@functools.cache
def shares_left(rotary: Rotary) -> list[list[float]]:
    """For each length of a served context, what c leaves of the square of each pair: the same for all heads and layers."""
    lengths = context_lengths(min(rotary.positions, MOST_POSITIONS))
    c = [sum(mean_turn(angle, n) for n in lengths) / len(lengths) for angle in rotary.angles]
    return [
        [
            1 + abs(x) ** 2 - 2 * (mean_turn(angle, n) * x.conjugate()).real
            for angle, x in zip(rotary.angles, c, strict=True)
        ]
        for n in context_lengths(rotary.served)
    ]


def left_of(bias: Sequence[float], rotary: Rotary | None) -> float:
    """Root of the mean, over the positions of a context, of |R(j) b - c|^2 of one head; of the served context where that is largest."""
    if rotary is None:
        return math.hypot(*bias)
    pairs = len(rotary.angles)
    first, second = (
        (bias[0 : 2 * pairs : 2], bias[1 : 2 * pairs : 2])
        if rotary.interleaved
        else (bias[:pairs], bias[pairs : 2 * pairs])
    )
    squares = [x * x + y * y for x, y in zip(first, second, strict=True)]
    return math.sqrt(max(0.0, *(sum(map(operator.mul, squares, shares)) for shares in shares_left(rotary))))
