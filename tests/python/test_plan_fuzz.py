"""`tq plan` on random changes of real configurations: a plan or one sentence, soon; and where two readers plan, the same plan."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, seed, settings
from hypothesis import strategies as st
from tq_backend import model_layers
from tq_backend.cli import read_config
from tq_backend.cli.main import main

PUBLISHED = Path(__file__).resolve().parent / "published_configs"
BASES = [json.loads(file.read_text()) for file in sorted(PUBLISHED.glob("*.json"))]
BASES += [
    row["config"] for row in json.loads((PUBLISHED.parents[1] / "bench" / "model_configs.json").read_text()).values()
]
SEED = int(os.environ.get("TQ_SEED") or random.SystemRandom().randrange(2**32))  # TQ_SEED repeats a run
SOON = 1.0  # seconds of CPU, of a refusal: the clock of a busy machine says nothing

KEYS = sorted({key for base in BASES for part in (base, base.get("text_config", {})) for key in part} | {
    "num_kv_heads", "n_head_kv", "sliding_window_pattern", "attn_layer_period", "attn_layer_offset", "linear_num_value_heads", "rope_scaling",
    "full_attention_interval", "use_sliding_window", "max_window_layers", "kv_lora_rank", "per_layer_config", "swa_window",
})  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 200), st.sampled_from([0, 2**31, 2**32 + 16, 10**6, 10**30, -(2**32)]), st.floats(),
    st.text(max_size=8), st.sampled_from(["full_attention", "sliding_attention", "mamba", "bfloat16", "float32", "auto", "MM*-", "LLLG"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def configs(draw) -> dict:
    """A real one with up to five keys changed, taken away or added, in its language model's part or outside it."""
    config = json.loads(json.dumps(draw(st.sampled_from(BASES))))
    for _ in range(draw(st.integers(0, 5))):
        part = config["text_config"] if isinstance(config.get("text_config"), dict) and draw(st.booleans()) else config
        key = draw(st.sampled_from(KEYS))
        if draw(st.booleans()):
            part[key] = draw(VALUES)
        else:
            part.pop(key, None)
    return config


def limits(examples: int):
    return settings(
        max_examples=examples, deadline=None, database=None, print_blob=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip


@pytest.fixture(autouse=True)
def said_seed():
    print(f"TQ_SEED={SEED}")


@seed(SEED)
@limits(400)
@given(config=configs())
def test_by_hand_a_plan_or_one_sentence_soon(config, tmp_path_factory, monkeypatch, capsys):
    monkeypatch.setattr(read_config, "READERS", {})
    file = tmp_path_factory.getbasetemp() / "fuzzed.json"
    file.write_text(json.dumps(config))
    began = time.process_time()
    code = main(["plan", "--config", str(file), "--memory", "24GiB", "--format", "turboquant_4bit_nc"])
    seconds = time.process_time() - began
    out, err = capsys.readouterr()
    assert not err
    if code == 0:
        assert "KV tokens" in out
        return
    assert code == 2
    assert out.startswith("tq plan: ") and out.count("\n") == 1 and len(out) < 1000, out
    assert seconds < SOON, out


@seed(SEED)
@limits(200)
@given(config=configs())
def test_two_readers_one_plan(config):
    """The class's reading against the file's: a difference is a wrong plan by one of them."""
    try:
        read_config.check_numbers(config)
        by_hand = model_layers.cache_layers(config)
    except ValueError:
        event("refused by hand")
        return
    try:
        by_class = model_layers.cache_layers(read_config.by_transformers(config))
    except (ValueError, read_config.NoClass):
        event("refused by its class")
        return
    event("compared")
    assert by_hand == by_class
