"""Key biases read from files that safetensors wrote, against the tensors themselves; what is said of them; and files that are none."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tq_backend import key_bias
from tq_backend._library import native
from tq_backend.cli.check import main as main_of_check
from tq_backend.cli.main import main
from tq_backend.key_bias import Heads, KeyBias

SEED = 20261128
HEADS = Heads("qwen2", 6, 2, 16)
MULTI_HEAD = Heads("gpt_neox", 4, 4, 16)
NAME = "model.layers.{}.self_attn.k_proj.bias"


def tensors(layers: int, size: int, dtype: torch.dtype, name: str = NAME) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    return {name.format(i): (torch.randn(size, generator=generator) * 10 ** (i % 3)).to(dtype) for i in range(layers)}


def expected(parts: dict[int, torch.Tensor], dim: int) -> list[KeyBias]:
    rows = {i: part.double().reshape(-1, dim) for i, part in parts.items()}
    norms = {i: x.norm(dim=-1).max().item() for i, x in rows.items()}
    return [KeyBias(i, norms[i], x.abs().max().item(), norms[i]) for i, x in rows.items()]  # no offset is taken


def same(found: list[KeyBias], wanted: list[KeyBias]) -> bool:
    pairs = [(b.layer, *map(pytest.approx, (b.norm, b.element, b.left))) for b in wanted]
    return [(b.layer, b.norm, b.element, b.left) for b in found] == pairs and len(wanted) > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_key_projections(dtype, tmp_path):
    given = tensors(12, 32, dtype)
    others = {
        "model.visual.blocks.0.attn.k_proj.bias": torch.full((32,), 1e4),
        "vision_tower.encoder.layers.1.self_attn.k_proj.bias": torch.full((32,), 1e4),
        "model.layers.2.self_attn.q_proj.bias": torch.full((96,), 1e4),
        "model.layers.3.self_attn.k_proj.weight": torch.full((32, 8), 1e4),
        "model.layers.90.self_attn.k_proj.bias": torch.full((7,), 1e4),  # no whole heads
    }
    save_file(given | others, tmp_path / "model.safetensors")
    assert same(key_bias.read(tmp_path, HEADS), expected(dict(enumerate(given.values())), 16))


def test_files_of_an_index_and_only_the_wanted_ones(tmp_path):
    given = tensors(4, 32, torch.bfloat16, "model.language_model.layers.{}.self_attn.k_proj.bias")
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(given)}
    for file in set(files.values()):
        save_file({name: given[name] for name in given if files[name] == file}, tmp_path / file)
    files["model.embed_tokens.weight"] = "not-downloaded.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert same(key_bias.read(tmp_path, HEADS), expected(dict(enumerate(given.values())), 16))


FUSED = {
    "model.layers.{}.self_attn.qkv_proj.bias": (HEADS, lambda x: x[96:128]),
    "transformer.h.{}.attn.c_attn.bias": (Heads("gpt2", 4, 4, 16), lambda x: x[64:128]),
    "h.{}.attn.c_attn.bias": (Heads("gpt_bigcode", 6, 1, 16), lambda x: x[96:112]),
    "transformer.encoder.layers.{}.self_attention.query_key_value.bias": (
        Heads("chatglm", 6, 2, 16), lambda x: x[96:128]
    ),
    "gpt_neox.layers.{}.attention.query_key_value.bias": (MULTI_HEAD, lambda x: x.reshape(4, 3, 16)[:, 1].flatten()),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_fused_projections(name, tmp_path):
    heads, keys = FUSED[name]
    size = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
    given = tensors(3, size, torch.float16, name)
    save_file(given, tmp_path / "model.safetensors")
    parts = {i: keys(bias).contiguous() for i, bias in enumerate(given.values())}
    assert same(key_bias.read(tmp_path, heads), expected(parts, 16))


def test_orders_that_are_not_known_are_not_guessed(tmp_path):
    given = tensors(2, 192, torch.float16, "transformer.h.{}.self_attention.query_key_value.bias")
    save_file(given, tmp_path / "model.safetensors")
    assert key_bias.read(tmp_path, Heads("falcon", 4, 4, 16)) == []
    assert len(key_bias.read(tmp_path, Heads("bloom", 4, 4, 16))) == 2


def test_keys_that_are_normalized_after_the_bias(tmp_path):
    given = tensors(2, 32, torch.float32)
    norm = {"model.layers.1.self_attn.k_norm.weight": torch.ones(16)}
    save_file(given | norm, tmp_path / "model.safetensors")
    assert [bias.layer for bias in key_bias.read(tmp_path, HEADS)] == [0]


# |b| of the largest head as they are in Qwen2.5-Coder 0.5B and 1.5B, and what was measured to be best with four native layers.
SMALL = {0: 279.0, 8: 278.0, 1: 227.0, 2: 128.0, 4: 53.0, 3: 32.4}
LARGE = {0: 912.0, 1: 170.0, 15: 80.0, 7: 70.0}
SAY = "{} is known to lose accuracy on this model (key bias {} in layer {}): use {}"
SKIP = '--additional-config \'{{"turboquant": {{"skip_layers": {}}}}}\''


FORMAT = '--additional-config \'{{"turboquant": {{"format": "{}"}}}}\''


def having(monkeypatch, *names: str) -> None:
    """The presets, and of the other formats these."""
    rows = [row for row in native().formats() if row["name"].startswith("turboquant_") or row["name"] in names]
    monkeypatch.setattr(key_bias, "native", lambda: SimpleNamespace(formats=lambda: rows))


def biases(norms: dict[int, float], layers: int, element: float = 0.5, left: float = 0.25) -> list[KeyBias]:
    found = {i: norms.get(i, 12.0) for i in range(layers)}
    return [KeyBias(i, norm, element * norm, left * norm) for i, norm in found.items()]


@pytest.mark.parametrize(
    ("norms", "native_layers", "top", "proposed"),
    [
        (SMALL, [], (279, 0), [0, 1, 2, 8]),
        (SMALL, [0, 1, 22, 23], (278, 8), [0, 1, 2, 8]),
        (SMALL, [0, 1, 2, 8], None, None),  # layer 4 is left, and four are native
        (LARGE, [], (912, 0), [0, 1, 7, 15]),
        (LARGE, [0, 1, 26, 27], (80, 15), [0, 1, 7, 15]),
        (LARGE, [0, 1, 7, 15], None, None),
        ({9: 41.0}, [0, 1, 22, 23], (41, 9), [9]),
        ({9: 39.0}, [], None, None),
        ({}, [], None, None),
    ],
)
def test_the_worst_layers_are_proposed(monkeypatch, norms, native_layers, top, proposed):
    having(monkeypatch)
    found = key_bias.sentence("turboquant_4bit_nc", biases(norms, 28), native_layers)
    assert found == ("" if top is None else SAY.format("turboquant_4bit_nc", *top, SKIP.format(proposed)))


def test_fp8_keys_lose_accuracy_where_they_are_clipped(monkeypatch):
    having(monkeypatch)
    assert key_bias.sentence("turboquant_k8v4", biases(SMALL, 24, element=0.75), []) == ""
    found = key_bias.sentence("turboquant_k8v4", biases(LARGE, 28, element=0.95), [])
    assert found == SAY.format("turboquant_k8v4", 912, 0, SKIP.format([0]))


def test_better_formats_are_named_where_there_are_any(monkeypatch):
    having(monkeypatch, "tq_4", "tq_8")
    found = key_bias.sentence("turboquant_4bit_nc", biases(LARGE, 28), [])
    assert found == SAY.format("turboquant_4bit_nc", 912, 0, f"{FORMAT.format('tq_8')} or {SKIP.format([0, 1, 7, 15])}")
    # There is more to do than to keep the four worst native.
    assert "in layer 4): use" in key_bias.sentence("turboquant_3bit_nc", biases(SMALL, 24), [0, 1, 2, 8])
    having(monkeypatch, "tq_8", "tq_k5v4")
    assert '"tq_k5v4"' in key_bias.sentence("turboquant_4bit_nc", biases(LARGE, 28), [])
    assert '"tq_8"' in key_bias.sentence("turboquant_k8v4", biases(LARGE, 28, element=0.95), [])


def test_formats_of_ours_lose_by_what_an_offset_leaves(monkeypatch):
    having(monkeypatch, "tq_4", "tq_8", "tq_k5v4")
    assert key_bias.native_by_default("turboquant_4bit_nc", biases(LARGE, 28)) is None  # vLLM's list
    for name in ("tq_4", "tq_k5v4"):
        assert key_bias.native_by_default(name, biases(LARGE, 28)) == [0, 1]  # a quarter of 912 and of 170
        assert key_bias.native_by_default(name, biases(SMALL, 24, left=0.125)) == []
        assert key_bias.native_by_default(name, biases(SMALL, 24, left=1.0)) == [0, 1, 2, 8]  # not more than four
        assert key_bias.sentence(name, biases(LARGE, 28), [0, 1]) == ""
        words = "known to lose accuracy on this model (key bias 170, of which an offset leaves 42, in layer 1): use "
        found = key_bias.sentence(name, biases(LARGE, 28), [0])
        assert found == f"{name} is {words}{FORMAT.format('tq_8')} or {SKIP.format([0, 1])}"
    assert key_bias.native_by_default("tq_8", biases(LARGE, 28, left=1.0)) == []
    assert key_bias.sentence("tq_8", biases(LARGE, 28, left=1.0), []) == ""


def test_only_the_formats_that_are_there(monkeypatch):
    assert key_bias.sentence("raw_f32", biases(LARGE, 28), []) == ""
    assert key_bias.sentence("no_format", biases(LARGE, 28), []) == ""


def unreadable(folder: Path, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"the weights in {folder} cannot be read as safetensors: ") + words):
        key_bias.read(folder, HEADS)


def test_folders_without_weights(tmp_path):
    unreadable(tmp_path / "absent", r"it has no \*\.safetensors")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    unreadable(tmp_path, r"it has no \*\.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {NAME.format(0): "../other/model.safetensors"}}))
    unreadable(
        tmp_path, "model.safetensors.index.json names '../other/model.safetensors', which is no file of the folder"
    )
    index.write_text(json.dumps({"weight_map": {NAME.format(0): "absent.safetensors"}}))
    unreadable(tmp_path, r"\[Errno 2\]")
    for text in ("", "[]", "{}", '{"weight_map": 7}', '{"weight_map": {"' + NAME.format(0) + '": 7}}', "[" * 100_000):
        index.write_text(text)
        unreadable(tmp_path, "")


def test_it_ends_in_time(tmp_path, monkeypatch):
    save_file(tensors(1, 32, torch.float32), tmp_path / "model.safetensors")
    monkeypatch.setattr(key_bias, "SECONDS", -1.0)
    unreadable(tmp_path, "it takes more than -1 s")


def test_broken_files_are_an_error_with_a_sentence(tmp_path):
    """Bytes changed and files cut short: an answer of finite numbers, or ValueError."""
    file = tmp_path / "model.safetensors"
    save_file(tensors(3, 32, torch.float16), file)
    whole, rng, refused = file.read_bytes(), random.Random(SEED), 0
    header = 8 + int.from_bytes(whole[:8], "little")
    for i in range(1000):
        broken = bytearray(whole[: rng.randrange(len(whole))] if i % 4 == 0 else whole)
        for _ in range(rng.randint(0, 3)):
            if broken:
                broken[rng.randrange(min(len(broken), header))] = rng.randrange(256)
        file.write_bytes(broken)
        try:
            key_bias.read(tmp_path, HEADS)
        except ValueError as error:
            assert str(tmp_path) in str(error), (SEED, i)
            refused += 1
    assert refused > 250


@pytest.fixture
def biased(tmp_path) -> Path:
    """A Qwen2 of 24 layers with the biases of Qwen2.5-Coder 0.5B."""
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 256, "hidden_size": 96,
        "intermediate_size": 64, "num_hidden_layers": 24, "num_attention_heads": 6, "num_key_value_heads": 2,
        "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = {NAME.format(i): torch.zeros(32) for i in range(24)}
    for layer, norm in SMALL.items():
        given[NAME.format(layer)][23] = norm  # of a slow pair, as in Qwen2.5
    save_file(given, tmp_path / "model.safetensors")
    return tmp_path


WAYS = f"{FORMAT.format('tq_k5v4')} or {SKIP.format([0, 1, 2, 8])}"


def test_tq_plan_says_it(biased, capsys):
    arguments = ["plan", "--config", str(biased), "--memory", "1GiB"]
    assert main(arguments) == 0
    said = [line.strip() for line in capsys.readouterr().out.splitlines() if "known to lose" in line]
    presets = ("turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc")
    assert said == [SAY.format(name, 278, 8, WAYS) for name in presets]
    assert main([*arguments, "--format", "tq_4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tq_4"]["skipped"] == [0, 1, 2, 8]  # it turns by 1.3 in 4096 tokens
    assert main([*arguments, "--format", "tq_4", "--json", "--max-model-len", "64"]) == 0
    assert json.loads(capsys.readouterr().out)["tq_4"]["skipped"] == [0, 1, 8]
    assert main([*arguments, "--skip-layers", "0,1,2,4,8"]) == 0
    assert "known to lose" not in capsys.readouterr().out
    (biased / "model.safetensors").unlink()
    assert main(arguments) == 0
    assert "known to lose" not in capsys.readouterr().out


def test_tq_check_says_it(biased, capsys):
    def check(*arguments: str) -> tuple[int, str]:
        return main_of_check([*arguments, "--model", str(biased)]), capsys.readouterr().out

    _, said = check()
    assert f"The largest key bias of {biased} is 279, in layer 0." in said
    assert SAY.format("turboquant_3bit_nc", 278, 8, WAYS) in said
    assert "turboquant_k8v4 is known" not in said
    (biased / "model.safetensors").unlink()
    _, said = check("--json")
    assert "it has no *.safetensors" in json.loads(said)["model"]["unknown"]
    (biased / "config.json").unlink()
    code, said = check()
    assert code == 2 and said.startswith("tq-check: --model ") and said.count("\n") == 1
