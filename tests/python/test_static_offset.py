"""What a static offset leaves of a rotated bias: against the rotated bias itself, position by position."""

from __future__ import annotations

import math
import random

import pytest
import torch
from tq_backend.static_offset import MOST_POSITIONS, Rotary, left_of, rotary_of

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


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [DIM, DIM // 2, 2])
@pytest.mark.parametrize("positions", [1, 2, 100, MOST_POSITIONS + 9000])
def test_the_rotated_bias_less_its_mean(interleaved, width, positions):
    generator = torch.Generator().manual_seed(SEED + positions)
    bias = torch.randn(DIM, generator=generator) * 10
    angles = 1e4 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    keys = turned(bias, angles, interleaved, positions)
    wanted = (keys - keys[:MOST_POSITIONS].mean(0)).square().sum(1).mean().sqrt().item()
    found = left_of(bias.tolist(), Rotary(tuple(angles.tolist()), interleaved, positions))
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
    assert (len(found.angles), found.interleaved, found.positions) == (pairs, interleaved, 77)
    assert found.angles == pytest.approx([base ** (-i / pairs) for i in range(pairs)])
