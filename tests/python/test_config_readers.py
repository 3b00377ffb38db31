"""Three readers of a configuration, by hand, by transformers and by vLLM, give the same layers; and they are the layers that a real
vLLM builds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tq_backend import model_layers
from tq_backend.class_defaults import CLASS_DEFAULTS
from tq_backend.cli import read_config
from tq_backend.cli.plan import plan
from tq_backend.model_text import FilledIn, text_config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HERE = Path(__file__).resolve().parent
PUBLISHED = HERE / "published_configs"
READERS = {"hand": dict} | read_config.READERS
# Whose class is not in transformers but in vLLM (which adds its own to transformers, once imported), or only in the model's repository.
NO_CLASS = {
    ("glm-4-9b", "transformers"), ("step3", "transformers"), ("nemotron-super-49b", "transformers"), ("nemotron-super-49b", "vllm"),
}  # fmt: skip

# Of each: how many layers keep (KV heads, head_dim, window), and the KV tokens of turboquant_4bit_nc in 24 GiB.
PLANNED = {
    "falcon-7b": ({(1, 64, 0): 32}, 8_635_984),
    "falcon-40b": ({(8, 64, 0): 60}, 651_536),
    "step3": ({(1, 256, 0): 61}, 1_354_160),
    "nemotron-super-49b": ({(8, 128, 0): 48}, 405_488),
    "command-r7b": ({(8, 128, 4097): 24, (8, 128, 0): 8}, 1_486_827),
    "minimax-m2": ({(8, 128, 0): 62}, 328_016),
    "llava-1.5-7b": ({(32, 128, 0): 32}, 138_832),
    "glm-4-9b": ({(2, 128, 0): 40}, 1_874_976),
    "bloom-7b1": ({(32, 128, 0): 30}, 145_568),
    "gpt2-xl": ({(25, 64, 0): 48}, None),
    "qwen3-omni-30b-a3b": ({(4, 128, 0): 48}, None),
    "granite4-h-small": ({(0, 0, 0): 36, (8, 128, 0): 4}, None),
}
REFUSED = {
    "mimo-v2-flash": "values of another width than keys",
    "bert-base": "no decoder that generates text",
    "clip-vit-large-patch14": "no decoder that generates text",
}


def read(name: str, reader: str):
    config = read_config.read_file(PUBLISHED / f"{name}.json")
    return READERS[reader](config)


@pytest.mark.parametrize("reader", read_config.READERS)
def test_reading_leaves_the_environment_as_it_was(monkeypatch, reader):
    """An engine that this process starts later must log as its user asked."""
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    before = dict(os.environ)
    read("glm-4-9b" if reader == "vllm" else "falcon-7b", reader)
    mine = {"VLLM_LOGGING_LEVEL", "HF_HUB_OFFLINE"}
    assert {k: v for k, v in os.environ.items() if k in mine} == {k: v for k, v in before.items() if k in mine}


def shapes(config) -> list[list[int]]:
    """Of the layers that own a cache or share one."""
    return sorted(
        [x.num_kv_heads, x.head_dim, x.sliding_window, x.state_bytes] for x in model_layers.cache_layers(config)
    )


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", PLANNED)
def test_published_numbers(name, reader):
    try:
        config = read(name, reader)
    except read_config.NoClass:
        assert (name, reader) in NO_CLASS
        return
    layers, tokens = PLANNED[name]
    assert Counter((x.num_kv_heads, x.head_dim, x.sliding_window) for x in model_layers.cache_layers(config)) == layers
    if tokens is not None:
        assert plan(config, "turboquant_4bit_nc", 16, 24 << 30)["kv_tokens"] == tokens


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", REFUSED)
def test_published_and_not_served(name, reader):
    with pytest.raises(ValueError, match=REFUSED[name]):
        model_layers.cache_layers(read(name, reader))


def test_a_layer_without_attention_has_no_cache():
    config = read("nemotron-super-49b", "hand")
    with_attention = [i for i, block in enumerate(config["block_configs"]) if not block["attention"]["no_op"]]
    assert [layer.number for layer in model_layers.cache_layers(config)] == with_attention


# By hand, what a file leaves out comes from a table; with other numbers in the file, derived values follow as in the class.
VARIATIONS = (
    {},
    {"num_hidden_layers": 10, "num_attention_heads": 24, "hidden_size": 3072},
    {"num_hidden_layers": 12, "num_attention_heads": 32, "num_key_value_heads": 4, "hidden_size": 2048, "head_dim": 64},
    {"num_hidden_layers": 8, "sliding_window": 100, "num_attention_heads": 64, "hidden_size": 4096},
)
OWN_NAMES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size"}


def varied(kind: str, variation: int) -> dict:
    changes = dict(VARIATIONS[variation])
    known = CONFIG_MAPPING[kind]().to_dict()
    for own, common in OWN_NAMES.items():
        if own in known and common in changes:
            changes[own] = changes.pop(common)
    # What the class does not know is no variation of it.
    changes = {key: value for key, value in changes.items() if key in known or key == "head_dim"}
    if kind in ("gemma4_text", "falcon"):
        changes.pop("head_dim", None)  # the one has two, the other none
    if changes.get("num_hidden_layers") and "num_kv_shared_layers" in known:
        changes["num_kv_shared_layers"] = 2
    if kind == "nemotron_h":
        changes.pop("num_hidden_layers", None)
        changes["layers_block_type"] = known["layers_block_type"]
    if kind == "granitemoehybrid":
        count = changes.get("num_hidden_layers", known["num_hidden_layers"])
        changes["layer_types"] = ["mamba"] * (count - 2) + ["attention"] * 2
    return {"model_type": kind, "dtype": "bfloat16"} | changes


@pytest.mark.parametrize("variation", range(len(VARIATIONS)))
@pytest.mark.parametrize("kind", [kind for kind in CLASS_DEFAULTS if kind in CONFIG_MAPPING])
def test_by_hand_as_the_class_reads_it(kind, variation):
    config = varied(kind, variation)
    made = read_config.filled_in(CONFIG_MAPPING[kind](**{k: v for k, v in config.items() if k != "model_type"}))
    assert model_layers.cache_layers(config) == model_layers.cache_layers(made)
    assert text_config(config)["max_position_embeddings"] == text_config(made)["max_position_embeddings"]


# Architectures whose class, defaults and all, a vLLM of Python alone can build.
BUILT = {
    "cohere": "CohereForCausalLM", "cohere2": "Cohere2ForCausalLM", "ernie4_5": "Ernie4_5ForCausalLM",
    "exaone4": "Exaone4ForCausalLM", "exaone_moe": "ExaoneMoeForCausalLM", "falcon": "FalconForCausalLM", "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM", "gemma4_text": "Gemma4ForCausalLM",
    "glm4": "Glm4ForCausalLM", "gpt2": "GPT2LMHeadModel", "gpt_oss": "GptOssForCausalLM", "gptj": "GPTJForCausalLM",
    "granite": "GraniteForCausalLM", "granite_swa": "GraniteSWAForCausalLM", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM", "mixtral": "MixtralForCausalLM", "opt": "OPTForCausalLM", "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "stablelm": "StableLmForCausalLM",
    "jamba": "JambaForCausalLM", "qwen3_next": "Qwen3NextForCausalLM", "granitemoehybrid": "GraniteMoeHybridForCausalLM",
}  # fmt: skip
# What the reduced files lack and the models' code asks for.
COMPLETED = {
    "falcon-40b": {"architectures": ["FalconForCausalLM"]},
    "glm-4-9b": {
        "original_rope": True,
        "tie_word_embeddings": False,
        "ffn_hidden_size": 13696,
        "padded_vocab_size": 151552,
        "layernorm_epsilon": 1e-5,
    },
    "minimax-m2": {"scoring_func": "sigmoid", "use_routing_bias": True},
}
# CPU engines keep these states in float32, whatever the model's dtype.
CPU_STATES = {"mamba_ssm_dtype": "float32"}


@pytest.fixture(scope="module")
def engine() -> dict[str, tuple[dict, dict]]:
    """Of each name the configuration and what a real vLLM makes of it."""
    configs = {}
    for kind, architecture in BUILT.items():
        made = json.loads(CONFIG_MAPPING[kind]().to_json_string(use_diff=False))
        configs[kind] = made | {"architectures": [architecture], "dtype": "bfloat16"}
    for name in ("falcon-7b", "falcon-40b", "command-r7b", "gpt2-xl", "granite4-h-small", "glm-4-9b", "minimax-m2"):
        configs[name] = read_config.read_file(PUBLISHED / f"{name}.json") | COMPLETED.get(name, {})
    done = subprocess.run(
        [sys.executable, HERE / "engine_layers.py"], input=json.dumps(list(configs.values())), capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(configs, zip(configs.values(), json.loads(done.stdout), strict=True), strict=True))


@pytest.mark.parametrize(
    "name", [*BUILT, "falcon-7b", "falcon-40b", "command-r7b", "gpt2-xl", "granite4-h-small", "glm-4-9b", "minimax-m2"]
)
def test_the_engine_builds_these_layers(engine, name):
    config, built = engine[name]
    assert "error" not in built, built
    read = read_config.by_vllm(config)
    if any(state for *_, state in built["layers"]):
        read = FilledIn(read | CPU_STATES)
    assert shapes(read) == [list(layer) for layer in built["layers"]]
    assert text_config(read)["max_position_embeddings"] in (built["length"], None)


def test_a_count_that_is_not_the_engines_is_refused(monkeypatch):
    monkeypatch.setattr(read_config, "text_config", lambda config: text_config(config) | {"num_key_value_heads": 71})
    with pytest.raises(ValueError, match="vLLM reads 1 KV heads from this configuration and tq-backend 71"):
        read("falcon-7b", "vllm")


@pytest.mark.parametrize(
    "key", ["kv_window_per_layer", "attention_groups", "sparse_block_size", "mamba_d_state", "attention_chunk_size"]
)
def test_a_key_that_nobody_reads_is_named(key):
    config = {"model_type": "llama", key: 4}
    with pytest.raises(ValueError, match=f"of a llama with {key}, which this version does not read"):
        model_layers.cache_layers(config)
    with pytest.raises(ValueError, match=f"of a llama with {key}, which this version does not read"):
        model_layers.cache_layers(read_config.by_transformers(config))


def test_windows_that_nobody_knows_the_place_of_are_refused():
    some = {"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 28}
    for config in (some, read_config.by_transformers(some)):
        with pytest.raises(ValueError, match="sets use_sliding_window of a qwen2"):
            model_layers.cache_layers(config)
    mixed = {
        "model_type": "qwen3_moe",
        "sliding_window": 4096,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
    }
    with pytest.raises(ValueError, match="some layers of a qwen3_moe a window"):
        model_layers.cache_layers(mixed)


def test_the_length_is_the_engines():
    base = {"model_type": "phi3", "max_position_embeddings": 131072}
    long = base | {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 4096}
    assert text_config(long)["max_position_embeddings"] == 4096
    assert (
        text_config(base | {"rope_scaling": {"type": "linear", "factor": 4.0}})["max_position_embeddings"] == 4 * 131072
    )
    assert (
        text_config(base | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})["max_position_embeddings"] == 131072
    )


def test_what_would_read_a_config(monkeypatch, tmp_path):
    """vLLM before transformers before nobody; one that cannot be imported is said and passed over."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llama"}))
    asked = []

    def reader(package, error=None):
        def read(config):
            asked.append(package)
            if error:
                raise error
            return FilledIn(config)

        return read

    monkeypatch.setattr(
        read_config,
        "READERS",
        {"vllm": reader("vllm", ImportError("no libcudart")), "transformers": reader("transformers")},
    )
    assert isinstance(read_config.read_config(file), FilledIn)
    assert asked == ["vllm", "transformers"]
    monkeypatch.setattr(read_config, "installed", lambda package: False)
    assert not isinstance(read_config.read_config(file), FilledIn)
