"""What a static offset leaves of a rotated bias: against the rotated bias itself, position by position."""

from __future__ import annotations

import math
import random

import pytest
import torch
from tq_backend.static_offset import MOST_POSITIONS, Rotary, context_lengths, left_of, rotary_of

SEED = 20261128
DIM = 32


def turned(bias: torch.Tensor, angles: torch.Tensor, interleaved: bool, positions: int) -> torch.Tensor:
    """[positions, dim]: the bias in the key of each token."""
    turn = torch.arange(positions, dtype=torch.float64)[:, None] * angles
    pairs, out = len(angles), bias.double().repeat(positions, 1)
    first = range(0, 2 * pairs, 2) if interleaved else range(pairs)
    second = range(1, 2 * pairs, 2) if interleaved else range(pairs, 2 * pairs)
    x, y = bias[list(first)].double(), bias[list(second)].double()
    out[:, list(first)] = x * turn.cos() - y * turn.sin()
    out[:, list(second)] = x * turn.sin() + y * turn.cos()
    return out


def doubling(longest: int) -> list[int]:
    return [n for n in (512, 1024, 2048, 4096, 8192, 16384, 32768) if n < longest] + [longest]


def test_lengths_of_contexts():
    for longest in (1, 511, 512, 513, 1000, 1024, 32767, 32768):
        assert context_lengths(longest) == doubling(longest)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [DIM, DIM // 2, 2])
@pytest.mark.parametrize(
    ("positions", "served"), [(1, 1), (100, 2), (900, 5000), (MOST_POSITIONS + 9000, 600), (4096, 100)]
)
def test_the_rotated_bias_less_its_mean(interleaved, width, positions, served):
    generator = torch.Generator().manual_seed(SEED + positions)
    bias = torch.randn(DIM, generator=generator) * 10
    angles = 1e4 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    keys = turned(bias, angles, interleaved, max(positions, served))
    c = torch.stack([keys[:n].mean(0) for n in doubling(min(positions, MOST_POSITIONS))]).mean(0)
    wanted = max((keys[:n] - c).square().sum(1).mean().sqrt().item() for n in doubling(served))
    found = left_of(bias.tolist(), Rotary(tuple(angles.tolist()), interleaved, positions, served))
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-5)


def test_all_is_left_where_no_offset_is_taken():
    bias = [random.Random(SEED).gauss(0, 1) for _ in range(DIM)]
    for text in ({"model_type": "gpt_oss", "rope_theta": 1e4}, {"model_type": "x", "attn_logit_softcapping": 50.0}):
        assert left_of(bias, rotary_of(text, DIM, 4096)) == pytest.approx(math.hypot(*bias))
    assert left_of(bias, rotary_of({"model_type": "gpt2"}, DIM, 4096)) == 0  # no embedding turns it


SLOW = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}


@pytest.mark.parametrize(
    ("text", "base", "pairs", "interleaved"),
    [
        ({"model_type": "qwen2", "rope_theta": 1e6}, 1e6, 16, False),
        ({"model_type": "qwen2", "rope_parameters": SLOW, "rope_theta": None}, 1e6, 16, False),
        ({"model_type": "qwen2"}, 1e4, 16, False),
        ({"model_type": "gpt_neox", "rotary_pct": 0.25, "rotary_emb_base": 5e3}, 5e3, 4, False),
        ({"model_type": "stablelm", "rope_parameters": {"rope_theta": 2e4, "partial_rotary_factor": 0.5}}, 2e4, 8, False),
        ({"model_type": "glm4", "partial_rotary_factor": 0.5}, 1e4, 8, True),
        ({"model_type": "chatglm"}, 1e4, 8, True),
        ({"model_type": "gptj", "rotary_dim": 8}, 1e4, 4, True),
        ({"model_type": "y", "rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
         1e4, 16, False),
        ({"model_type": "y", "rope_theta": float("nan"), "partial_rotary_factor": "half"}, 1e4, 16, False),
    ],
)  # fmt: skip
def test_rotary_embeddings_of_configurations(text, base, pairs, interleaved):
    found = rotary_of(text, DIM, 77)
    assert (len(found.angles), found.interleaved, found.positions, found.served) == (pairs, interleaved, 77, 77)
    assert rotary_of(text | {"max_position_embeddings": 5000}, DIM, 77).positions == 5000
    assert found.angles == pytest.approx([base ** (-i / pairs) for i in range(pairs)])
