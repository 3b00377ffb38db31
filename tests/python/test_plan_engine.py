"""The planner's KV tokens are the engine's: vLLM's own planning functions on specs built from a plan, for published configs and
for random mixtures of layers. Nothing is run."""

import json
import random
import sys
from pathlib import Path

import pytest
import transformers
from tq_backend import model_layers
from tq_backend._library import native
from tq_backend.cli.plan import IN_FLIGHT_TOKENS, plan
from tq_backend.cli.read_config import filled_in

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "bench"))
import engine_arithmetic as engine  # noqa: E402

MODELS = json.loads((ROOT / "tests" / "bench" / "model_configs.json").read_text())
PRESETS = ("turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc")
GIB = 1 << 30


def planned(name, format_name, memory, **options):
    """A model's plan, and the layers that the planner was given for it."""
    row = MODELS[name]
    found = plan(row["config"], format_name, 16, memory, tp=row["tp"], **options)
    element = 1 if format_name == "fp8" else 2
    layers = model_layers.plan_layers(
        model_layers.cache_layers(row["config"], row["tp"]),
        format_name if format_name in PRESETS else None,
        element,
        found["skipped"],
    )
    return layers, found


@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_kv_tokens_are_the_engines(name, side_by_side):
    for format_name in ("auto", "fp8", *PRESETS):
        for memory in (5 * GIB, 80 * GIB + 12345):
            layers, found = planned(name, format_name, memory, side_by_side=side_by_side)
            arguments = (layers, found, memory, found["max_model_len"], IN_FLIGHT_TOKENS)
            if found["longest_sequence"] < found["max_model_len"]:
                with pytest.raises(
                    engine.RefusedByEngine, match=f"maximum model length is {found['longest_sequence']}"
                ):
                    engine.capacity_of_plan(*arguments)
                continue
            got = engine.capacity_of_plan(*arguments)
            assert (got.num_blocks, got.kv_tokens, got.num_groups) == (
                found["num_blocks"], found["kv_tokens"], found["num_groups"],
            ), format_name  # fmt: skip


@pytest.mark.parametrize("seed", range(60))
def test_random_mixtures_are_the_engines(seed):
    rng = random.Random(seed)
    pool = [
        {"format": "turboquant_4bit_nc", "num_kv_heads": 2, "head_dim": 256},
        {"format": "turboquant_4bit_nc", "num_kv_heads": 2, "head_dim": 256, "sliding_window": 512},
        {"format": "turboquant_3bit_nc", "num_kv_heads": 4, "head_dim": 128},
        {"format": None, "native_bytes": 2, "num_kv_heads": 2, "head_dim": 256},
        {"format": None, "native_bytes": 2, "num_kv_heads": 2, "head_dim": 512, "sliding_window": 1024},
        {"format": None, "native_bytes": 1, "num_kv_heads": 8, "head_dim": 64, "head_dim_v": 128},
        {"state_bytes": 270_336},
        {"state_bytes": 1_048_576},
    ]
    layers = [dict(kind) for kind in rng.sample(pool, rng.randint(1, 5)) for _ in range(rng.randint(1, 14))]
    rng.shuffle(layers)
    for i in range(1, len(layers)):
        j = rng.randrange(i)
        if rng.random() < 0.1 and layers[i] == layers[j] and "state_bytes" not in layers[i]:
            layers[i]["kv_sharing_target"] = j
    memory, length, in_flight = rng.randint(60, 90) * GIB, rng.randint(1000, 60_000), rng.randint(256, 8192)
    blocks_per_state = rng.randint(1, 2)
    side_by_side = rng.random() < 0.6
    found = native().plan_pages(
        layers, rng.choice([16, 32]), memory, max_model_len=length, max_in_flight_tokens=in_flight,
        blocks_per_state=blocks_per_state, side_by_side=side_by_side,
    )  # fmt: skip
    got = engine.capacity_of_plan(layers, found, memory, length, in_flight, blocks_per_state)
    assert (got.num_blocks, got.kv_tokens, got.num_groups) == (
        found["num_blocks"], found["kv_tokens"], found["num_groups"],
    ), f"seed {seed}: {found['strategy']}"  # fmt: skip


def test_block_sizes_have_a_bounded_common_multiple():
    """The engine's scheduler advances prefix-cache hits by it."""
    for name in MODELS:
        layers, found = planned(name, "turboquant_4bit_nc", 80 * GIB)
        if any(layer["state_bytes"] for layer in layers):
            continue  # a state has a page per sequence, whatever the attention layers' are
        got = engine.capacity_of_plan(layers, found, 80 * GIB, found["max_model_len"], IN_FLIGHT_TOKENS)
        assert got.scheduler_block_size <= 1024, name


def test_gemma_4_e4b_skips_in_pairs():
    config = MODELS["Gemma 4 E4B"]["config"]
    skipped = model_layers.skip_layers(config, "turboquant_4bit_nc")
    assert skipped == [0, 1, 22, 23, *range(24, 42)]
    wide = [layer.number for layer in model_layers.cache_layers(config) if layer.head_dim == 512]
    assert [number for number in wide if number not in skipped] == [5, 11, 17]


@pytest.mark.parametrize(("format_name", "ratio"), list(zip(PRESETS, (2.04, 2.57, 2.75, 2.96), strict=True)))
def test_gemma_4_e4b_against_bf16(format_name, ratio):
    """Bytes per token of all layers that own a cache; and in the KV tokens that both engines' plans hold, in-tree's with its own
    native windows and ours with compressed ones."""
    _, bf16 = planned("Gemma 4 E4B", "auto", 8 * GIB)
    _, ours = planned("Gemma 4 E4B", format_name, 8 * GIB)
    assert bf16["bytes_per_token"] / ours["bytes_per_token"] >= ratio
    assert ours["waste_bytes"] / (ours["blocks_per_sequence"] * ours["bytes_per_block"]) < 0.02
    row = MODELS["Gemma 4 E4B"]
    in_tree = [
        engine.in_tree_capacity(
            row["config"], name, 8 * GIB, tp=1, max_model_len=131072, in_flight_tokens=IN_FLIGHT_TOKENS
        ).kv_tokens
        for name in ("auto", format_name)
    ]
    assert in_tree[0] == bf16["kv_tokens"]
    assert ours["kv_tokens"] > in_tree[1]


def test_gemma_4_31b_on_four_16_gb_cards():
    """Its 262,144 tokens need 4.2 GiB a card in fp8 and 2.7 GiB in 4 bits."""
    memory = MODELS["Gemma 4 31B"]["memory_gib"] * GIB
    length = 262_144
    assert planned("Gemma 4 31B", "fp8", memory)[1]["longest_sequence"] < length
    assert planned("Gemma 4 31B", "turboquant_4bit_nc", memory)[1]["longest_sequence"] == length
    assert planned("Gemma 4 31B", "turboquant_4bit_nc", memory)[1]["max_model_len"] == length


CLASSES = {
    "Gemma 2 9B": "Gemma2Config",
    "Gemma 3 4B": "Gemma3TextConfig",
    "Gemma 3n E4B": "Gemma3nTextConfig",
    "Gemma 4 E4B": "Gemma4TextConfig",
    "Gemma 4 31B": "Gemma4TextConfig",
    "gpt-oss 20B": "GptOssConfig",
    "Qwen3-Next 80B-A3B": "Qwen3NextConfig",
    "Phi-4": "Phi3Config",
    "Qwen3.5 35B-A3B": "Qwen3_5MoeTextConfig",
    "Nemotron-H 8B": "NemotronHConfig",
    "Jamba v0.1": "JambaConfig",
}


@pytest.mark.parametrize("name", CLASSES)
def test_config_class_and_file_give_the_same_layers(name):
    """What Hugging Face's class makes of the published numbers: its layer types, its defaults, its per-layer overrides."""
    row = MODELS[name]
    text = row["config"].get("text_config", row["config"])
    numbers = {key: value for key, value in text.items() if key != "model_type"}
    made = getattr(transformers, CLASSES[name])(**numbers).to_dict()
    assert model_layers.cache_layers(made, row["tp"]) == model_layers.cache_layers(row["config"], row["tp"])


@pytest.mark.parametrize(
    "name", ["BambaConfig", "Zamba2Config", "FalconH1Config", "RecurrentGemmaConfig", "MambaConfig", "Lfm2MoeConfig"]
)
def test_what_is_not_known_is_refused(name):
    """And not taken for a model of attention layers."""
    with pytest.raises(ValueError, match=r"which this version does not read|has no num_attention_heads"):
        model_layers.cache_layers(filled_in(getattr(transformers, name)()))


def test_state_bytes_are_the_engines():
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator as Shapes

    def size(shapes, element_bytes):
        total = 0
        for shape, element in zip(shapes, element_bytes, strict=True):
            product = element
            for extent in shape:
                product *= extent
            total += product
        return total

    for tp in (1, 2, 4):
        cases = {
            "Qwen3-Next 80B-A3B": size(Shapes.gated_delta_net_state_shape(tp, 16, 32, 128, 128, 4), (2, 2)),
            "Qwen3.5 35B-A3B": size(Shapes.gated_delta_net_state_shape(tp, 16, 32, 128, 128, 4), (2, 4)),
            "Nemotron-H 8B": size(Shapes.mamba2_state_shape(tp, 8192, 8, 128, 64, 128, 4), (2, 4)),
            "Jamba v0.1": size(Shapes.mamba1_state_shape(tp, 8192, 16, 4), (2, 2)),
        }
        for name, expected in cases.items():
            states = {layer.state_bytes for layer in model_layers.cache_layers(MODELS[name]["config"], tp)} - {0}
            assert states == {expected}, (name, tp)
