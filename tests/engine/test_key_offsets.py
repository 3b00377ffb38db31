"""Static key offsets of real engines: against what Hugging Face's models make of a key without input, and what taking them from all
keys does to an engine."""

from __future__ import annotations

import logging

import pytest
import tiny_models
import torch
import transformers
from engines import attention_layers, raw_pages, running
from safetensors.torch import load_file
from tiny_models import KEY_BIAS, prompt
from tq_backend import key_bias
from tq_backend._library import native
from tq_backend.cli.engine import format_option
from tq_backend.cli.read_config import read_config
from tq_backend.model_text import text_config
from tq_backend.vllm_adapter import formats, key_offsets, patches

DTYPE = "turboquant_4bit_nc"
CONTEXT = (
    300  # tokens that an engine serves; its models are made for 1024, and the cache of cos and sin has so many or more
)
LENGTHS = (512, 1024)
OPTIONS = {"dtype": "float32", "context": CONTEXT - 1, "skip_tokenizer_init": True}
ROTARY = ("qwen2", "qwen2_yarn", "glm4", "stablelm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def said(monkeypatch) -> list[tuple[int, str]]:
    """vLLM takes handlers off its loggers when a process starts its first engine."""
    lines: list[tuple[int, str]] = []
    for level in (logging.INFO, logging.WARNING):
        name = logging.getLevelName(level).lower()
        for module in (key_offsets, patches):
            monkeypatch.setattr(
                module.logger, name, lambda text, *args, level=level: lines.append((level, text % args))
            )
    return lines


def keys_without_input(model_folder, positions: int) -> list[torch.Tensor]:
    """Of each layer [heads, positions, head_dim], from Hugging Face's own cache."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    for name, module in model.named_modules():
        if name.endswith(("k_proj", "c_attn")):
            module.register_forward_pre_hook(lambda _module, args: (torch.zeros_like(args[0]), *args[1:]))
    with torch.no_grad():
        cache = model(torch.zeros(1, positions, dtype=torch.int64), use_cache=True).past_key_values
    return [layer.keys[0] for layer in cache.layers]


@pytest.mark.parametrize("name", [*ROTARY, "gpt2"])
def test_the_offset_is_the_mean_key_without_input(name, folder, monkeypatch):
    model = tiny_models.make(name, folder)
    keys = keys_without_input(model, max(LENGTHS))
    monkeypatch.setattr(key_offsets, "STEP", 200)
    # Learned positions are as many as the checkpoint has.
    positions = {"hf_overrides": {"max_position_embeddings": 1024}} if name == "gpt2" else {}
    with running(None, model=model, **OPTIONS | positions) as engine:
        names = [layer.layer_name for layer in attention_layers(engine)]
        for lengths in (LENGTHS, (100,)):
            monkeypatch.setattr(key_offsets, "MOST_POSITIONS", max(lengths))
            found, reasons = key_offsets.of_network(engine.model)
            assert reasons == {}
            means = {
                layer: torch.stack([k[:, :n].double().mean(1) for n in lengths]).mean(0).float()
                for layer, k in zip(names, keys, strict=True)
            }
            largest = {layer: mean.norm(dim=-1).max() for layer, mean in means.items()}
            # Biases are 300, 100, 60 and 4, and their means have most of that.
            assert list(found) == [layer for layer in names if largest[layer] > key_offsets.LEAST_NORM]
            assert [names.index(layer) for layer in found] == list(KEY_BIAS)
            for layer, offset in found.items():
                assert offset.dtype == torch.float32
                torch.testing.assert_close(offset, means[layer], rtol=0, atol=1e-4 * largest[layer].item())
    # What the configuration and the weights on disk say is left, before there is an engine. Yarn turns more slowly than is reckoned.
    text = text_config(read_config(str(model)))
    for bias in key_bias.read(model, key_bias.heads_of(text, CONTEXT)):
        mean = torch.stack([keys[bias.layer][:, :n].mean(1, keepdim=True) for n in LENGTHS]).mean(0)
        left = (keys[bias.layer][:, :CONTEXT] - mean).square().sum(-1).mean(-1).sqrt().max().item()
        assert bias.left == pytest.approx(left, rel=1e-3, abs=1e-3) or (name == "qwen2_yarn" and bias.left > left)
    if name in ROTARY:  # or the mean over other positions would do too
        assert (keys[0][-1, :100].mean(0) - keys[0][-1].mean(0)).norm() > 0.01


def test_an_engine_in_bfloat16_keeps_its_rotary_embedding(folder):
    """A captured CUDA graph reads that memory."""
    model = tiny_models.make("qwen2", folder)
    mean = keys_without_input(model, CONTEXT)[0].mean(1)
    shorter = {"dtype": "bfloat16", "hf_overrides": {"max_position_embeddings": CONTEXT}}
    with running(None, model=model, **OPTIONS | shorter) as engine:
        rotary = next(module for module in engine.model.modules() if key_offsets.is_rotary(module))
        before = rotary.cos_sin_cache
        found = next(iter(key_offsets.of_network(engine.model)[0].values()))
        assert rotary.cos_sin_cache is before and before.dtype == torch.bfloat16 and len(before) == CONTEXT
    torch.testing.assert_close(found, mean, rtol=0, atol=0.01 * mean.norm().item())


NATIVE = [layer for layer in range(6) if layer not in KEY_BIAS]


def biased(model, kv_format):
    """The engine whose layers with a large bias alone are compressed."""
    options = {"skip_layers": NATIVE} | (format_option(kv_format) if kv_format else {})
    return running(kv_format, model=model, **OPTIONS | {"additional_config": {"turboquant": options}})


def without_offsets(patch) -> None:
    patch.setattr(formats, "subtracts_key_offset", lambda _dtype: False)


def log_probs(engine) -> torch.Tensor:
    return engine.log_probs(engine.prefill(prompt(250, seed=4)))


def test_the_softmax_does_not_see_it(folder, said, monkeypatch):
    """Floats in the pages: only rounding may differ."""
    model = tiny_models.make("qwen2", folder)
    with raw_pages(), monkeypatch.context() as patch:
        without_offsets(patch)
        with biased(model, DTYPE) as engine:
            plain = log_probs(engine)
        patch.setattr(formats, "subtracts_key_offset", lambda _dtype: True)
        with biased(model, DTYPE) as engine:
            offsets = [getattr(layer.impl, "key_offset", None) for layer in attention_layers(engine)]
            assert [i for i, offset in enumerate(offsets) if offset is not None] == list(KEY_BIAS)
            less = log_probs(engine)
    print("difference", (less - plain).abs().max().item())
    assert 0 < (less - plain).abs().max() < 1e-3
    line = next(text for level, text in said if level == logging.INFO and "static offset" in text)
    assert line.startswith("tq-backend takes a static offset from the keys of layers 0, 3, 5 (largest: "), line
    assert line.endswith(", in layer 0)")


def test_presets_take_none(folder):
    assert not any(map(formats.subtracts_key_offset, formats.CACHE_DTYPES))
    with running(DTYPE, model=tiny_models.make("qwen2", folder), **OPTIONS) as engine:
        assert all(layer.impl.key_offset is None for layer in attention_layers(engine))


def test_formats_of_our_own_take_one(monkeypatch):
    own = [
        row["name"] for row in native().formats() if row["name"] not in formats.CACHE_DTYPES and not row["test_only"]
    ]
    for name in own:
        monkeypatch.setattr(formats, "page_format", lambda _dtype, name=name: name)
        assert all(map(formats.subtracts_key_offset, formats.CACHE_DTYPES))
    assert own


def other_biases(model, factors: dict[int, float]) -> list[tuple[str, torch.Tensor]]:
    """The checkpoint with the key biases of some layers multiplied."""
    found = []
    for name, weight in load_file(model / "model.safetensors").items():
        layer = int(name.split(".")[2]) if name.endswith("k_proj.bias") else -1
        found.append((name, weight * factors.get(layer, 1.0)))
    return found


def test_weights_that_are_loaded_again(folder, said):
    """The memory stays, for CUDA graphs; a layer that had an offset keeps one, a layer that had none gets none."""
    model = tiny_models.make("qwen2", folder)
    with running("tq_8", model=model, **OPTIONS) as engine:
        impls = [layer.impl for layer in attention_layers(engine)]
        offsets = {i: impl.key_offset for i, impl in enumerate(impls) if impl.key_offset is not None}
        before = {i: offset.clone() for i, offset in offsets.items()}
        said.clear()
        weights = other_biases(model, {0: -0.5, 1: 100.0, 3: 0.001})
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        assert all(impls[i].key_offset is offset for i, offset in offsets.items()) and impls[1].key_offset is None
        torch.testing.assert_close(offsets[0], -0.5 * before[0])
        assert not offsets[3].any()
        torch.testing.assert_close(offsets[5], before[5])
    late = "tq-backend takes no offset from the keys of layers 1, whose bias came with weights that were loaded later"
    assert said == [(logging.WARNING, late)]


def test_keys_that_are_normalized_get_none(folder, said):
    with running("tq_8", model=tiny_models.make("qwen3_bias", folder), **OPTIONS) as engine:
        assert all(layer.impl.key_offset is None for layer in attention_layers(engine))
    line = "tq-backend takes no offset from the keys of layers 0-5: a RMSNorm stands beside it"
    assert [text for _, text in said if "offset" in text] == [line]


def test_layers_that_get_none(folder, monkeypatch):
    """On the layers of an engine, one change at a time."""
    with running(DTYPE, model=tiny_models.make("qwen2", folder), **OPTIONS) as engine:
        layers = attention_layers(engine)
        names = [layer.layer_name for layer in layers]

        def found() -> tuple[list[int], dict[int, str]]:
            offsets, reasons = key_offsets.of_network(engine.model)
            return [names.index(name) for name in offsets], {names.index(name): why for name, why in reasons.items()}

        assert found() == ([0, 3, 5], {})
        seen = "sinks or a soft cap see what is taken from all scores"
        for change in ({"sinks": torch.zeros(4)}, {"logits_soft_cap": 30.0}):
            with monkeypatch.context() as patch:
                for name, value in change.items():
                    patch.setattr(layers[3].impl, name, value)
                assert found() == ([0, 5], {3: seen})
                # Layer 3 reads the cache of layer 0: it has no keys, and its soft cap would see what is taken from layer 0's.
                patch.setattr(layers[3].impl, "kv_sharing_target_layer_name", names[0])
                assert found() == ([5], {0: seen})
        with monkeypatch.context() as patch:
            patch.setattr(layers[3].impl, "kv_sharing_target_layer_name", names[0])
            assert found() == ([0, 5], {})
        attention = engine.model.model.layers[3].self_attn
        with monkeypatch.context() as patch:
            patch.setitem(attention._modules, "rotary_emb", None)
            assert found() == ([0, 3, 5], {})
            patch.setitem(engine.model.model._modules, "rotary_emb", engine.model.model.layers[0].self_attn.rotary_emb)
            assert found() == ([0, 5], {3: "it is not known whether it takes the rotary embedding above it"})
        for name, other, why in (
            ("qkv_proj", torch.nn.Identity(), "there is no projection of a known kind beside it"),
            ("rotary_emb", torch.nn.Identity(), "a Identity stands beside it"),
        ):
            with monkeypatch.context() as patch:
                patch.setitem(attention._modules, name, other)
                assert found() == ([0, 5], {3: why})
        with monkeypatch.context() as patch:
            patch.setattr(type(attention.rotary_emb), "forward_native", lambda *_: 1 / 0)
            assert found() == ([], {i: "ZeroDivisionError: division by zero" for i in KEY_BIAS})
        with monkeypatch.context() as patch:
            patch.setattr(key_offsets, "LEAST_SHARE", 1.01)  # of no bias that turns
            assert found() == ([], {})
        left = key_offsets.of_network(engine.model)[0][names[5]].norm(dim=-1).max().item()
        with monkeypatch.context() as patch:
            patch.setattr(key_offsets, "LEAST_NORM", (left + KEY_BIAS[5]) / 2)  # of the bias, and not of its mean
            assert found() == ([0, 3], {})


def test_a_rank_has_the_offsets_of_its_heads(folder, monkeypatch):
    """The projection of the second of two ranks, which has the second of two KV heads."""
    with running(None, model=tiny_models.make("qwen2", folder), **OPTIONS) as engine:
        layers = attention_layers(engine)
        both = key_offsets.of_network(engine.model)[0]
        for layer, decoder in zip(layers, engine.model.model.layers, strict=True):
            projection, dim = decoder.self_attn.qkv_proj, layer.head_size
            rows = torch.cat(
                [torch.arange(128).chunk(2)[1], torch.arange(128, 192).chunk(2)[1], torch.arange(192, 256).chunk(2)[1]]
            )
            rows = rows if dim == 32 else pytest.fail("the model's heads changed")
            monkeypatch.setattr(projection, "num_heads", 2)
            monkeypatch.setattr(projection, "num_kv_heads", 1)
            monkeypatch.setattr(layer.impl, "num_kv_heads", 1)
            monkeypatch.setattr(projection, "bias", torch.nn.Parameter(projection.bias.data[rows], requires_grad=False))
            monkeypatch.setattr(projection.quant_method, "apply", lambda _layer, x, bias: bias.expand(len(x), -1))
        one = key_offsets.of_network(engine.model)[0]
    assert one.keys() == both.keys() and len(one) == 3
    for name, offset in one.items():
        torch.testing.assert_close(offset, both[name][1:])
