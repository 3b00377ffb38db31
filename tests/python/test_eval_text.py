"""What `tq eval` measures on: windows in any tokenizer's tokens, a novel out of a Debian package, keys hidden in prompts."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from tq_backend.cli import heldout, prose

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "tiny-code-lm"
PAD, EOS, BOS = 0, 1, 2


@pytest.fixture
def folder(tmp_path):
    """make(bos template, config, tokenizer config): a tokenizer of single characters, whose token 0 is padding."""

    def make(template: str | None, config: dict, tokenizer_config: dict | None = None) -> Path:
        model = tmp_path / "model"
        model.mkdir()
        words = ["<pad>", "<eos>", "<bos>", "<unk>", *map(chr, range(9, 127))]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words[:4]])
        if template is not None:
            special = [("<bos>", BOS), ("<eos>", EOS)]
            tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
        tokenizer.save(str(model / "tokenizer.json"))
        (model / "config.json").write_text(json.dumps(config))
        if tokenizer_config is not None:
            (model / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
        return model

    return make


@pytest.mark.parametrize(
    ("template", "tokenizer_config", "begin"),
    [
        ("<bos> $A", None, [BOS]),
        ("<bos> $A <eos>", None, [BOS]),
        ("$A <eos>", None, []),
        (None, None, []),
        (None, {"add_bos_token": True, "bos_token": "<bos>"}, [BOS]),
        (None, {"add_bos_token": True, "bos_token": {"content": "<bos>"}}, [BOS]),
        (None, {"add_bos_token": False, "bos_token": "<bos>"}, []),
    ],
)
def test_a_window_begins_as_the_tokenizer_does(template, tokenizer_config, begin, folder):
    model = folder(template, {"eos_token_id": EOS}, tokenizer_config)
    windows = heldout.windows_of(model, "code", 3, 50)
    assert [len(window) for window in windows] == [50] * 3
    for window in windows:
        assert window[: len(begin)] == begin
        assert BOS not in window[len(begin) :] and PAD not in window
    text = [token for window in windows for token in window[len(begin) :]]
    assert text == heldout.heldout_tokens(model, len(text))  # nothing is left out between windows


@pytest.mark.parametrize(
    ("config", "end"),
    [
        ({"eos_token_id": EOS}, [EOS]),
        ({"eos_token_id": [106, EOS]}, [EOS]),
        ({"text_config": {"eos_token_id": EOS}}, [EOS]),
        ({"pad_token_id": PAD}, []),
    ],
)
def test_a_file_ends_with_the_models_end_of_text(config, end, folder, tmp_path):
    model = folder("<bos> $A", config)
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a").write_text("aa")
    (texts / "b").write_text("bb")
    a, b = (heldout.plain(model, x) for x in ("aa", "bb"))
    assert heldout.heldout_tokens(model, 4 + 2 * len(end), str(texts)) == [*a, *end, *b, *end]
    assert heldout.heldout_tokens(model, 2, str(texts / "b")) == b
    with pytest.raises(ValueError, match=f"has {4 + 2 * len(end)} tokens; 100 were asked for"):
        heldout.heldout_tokens(model, 100, str(texts))


def test_the_small_models_text_is_the_one_of_the_bars():
    """The reference figures are of this text: all of anyio's files, each followed by token 0."""
    tokens = heldout.heldout_tokens(MODEL, 20000)
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    want: list[int] = []
    for path in heldout.code_files():
        want += [*tokenizer.encode(path.read_text(encoding="utf-8")).ids, 0]
    assert tokens == want[:20000]


def test_text_that_is_none(folder, tmp_path):
    model = folder(None, {})
    (tmp_path / "x.bin").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ValueError, match=r"x\.bin is no text in UTF-8"):
        heldout.heldout_tokens(model, 1, str(tmp_path / "x.bin"))
    with pytest.raises(ValueError, match="there is no such file"):
        heldout.heldout_tokens(model, 1, str(tmp_path / "none"))


@pytest.mark.parametrize("template", ["<bos> $A", "<bos> $A <eos>", None])
@pytest.mark.parametrize("key", range(8))
def test_a_key_is_hidden_inside(key, template, folder):
    model = folder(template, {"eos_token_id": EOS})
    tokens, secret = heldout.retrieval_prompt(model, key, 700)
    assert len(tokens) == 700 and tokens.count(BOS) == (template is not None)
    text = "".join(heldout.load_tokenizer(model).id_to_token(token) for token in tokens)
    assert text.count(secret) == 1 and 0 < text.index(secret) < 700 * 7 // 8
    assert text.endswith("Answer:")
    with pytest.raises(ValueError, match="too short to hide a key in"):
        heldout.retrieval_prompt(model, key, 40)


def r_string(text: str) -> bytes:
    """As R's serialize() writes a CHARSXP: flags, length, bytes."""
    flags = 0x00040009 if text.isascii() else 0x00008009
    raw = text.encode()
    return struct.pack(">ii", flags, len(raw)) + raw


def record(lines: list[str]) -> bytes:
    body = b"X\n\x00\x00\x00\x03" + struct.pack(">ii", 16, len(lines)) + b"".join(map(r_string, lines))
    return struct.pack(">i", len(body)) + zlib.compress(body)


def test_a_novel_is_read_from_an_unpacked_package(tmp_path, monkeypatch):
    # A line of 9 bytes has a length that looks like a type; é makes one that is no ASCII.
    long = ["PERSUASION", "", "by Jane Austen", "nine char", "café", *(f"line {i}" for i in range(600))]
    file = tmp_path / "debian" / prose.INSIDE
    file.parent.mkdir(parents=True)
    file.write_bytes(record(["EMMA"] * 501) + record(["PERSUASION", "short"]) + record(long))
    monkeypatch.setenv("TQ_REAL_MODELS", str(tmp_path))
    if prose.data_file() != file:
        pytest.skip("the package is installed on this machine")
    assert prose.novel("Persuasion") == "\n".join(long) + "\n"
    with pytest.raises(ValueError, match="has no novel 'Middlemarch'"):
        prose.novel("Middlemarch")


def test_prose_that_is_not_there(monkeypatch):
    monkeypatch.delenv("TQ_REAL_MODELS", raising=False)
    monkeypatch.setattr(prose, "INSIDE", "nowhere/Rdata.rdb")
    with pytest.raises(ValueError, match="install it, or unpack it with"):
        prose.novel("Persuasion")
