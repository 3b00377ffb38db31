"""`tq eval` passes with our kernels, fails when two centroids trade places, and serves models of other kinds than the small one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from engines import MODEL, running
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tq_backend._library import native
from tq_backend.cli import reads, simulated
from tq_backend.cli.engine import counters
from tq_backend.cli.heldout import windows_of
from tq_backend.cli.peers import PEERS
from tq_backend.cli.reads import attention_layers, check_all_compressed
from tq_backend.cli.scores import compare
from tq_backend.names import is_ours

DTYPE = "turboquant_4bit_nc"


def tq_eval(*args: str, model: Path = MODEL, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tq_backend.cli.main", "eval", "--model", str(model), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | env)


def test_every_preset_is_within_its_bar(tmp_path):
    names = [row["name"] for row in native().formats() if is_ours(row["name"])]
    done = tq_eval("--decode", "--formats", *names, "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["cache"] for row in rows] == ["bf16", *names]
    assert all(row["decode_kl"] and row["windows"] == 8 and row["window"] == 4096 for row in rows[1:])
    assert sum(bool(row["bar"]) for row in rows) == 4


def test_swapped_centroids_are_noticed(build_dir):
    """A kernel library that is wrong in one detail: codes 8 and 9 of every stored key are exchanged."""
    done = tq_eval("--formats", DTYPE, TQ_KERNELS_DIR=str(build_dir / "tests" / "swapped_centroids"))
    assert done.returncode == 1, done.stdout + done.stderr[-2000:]
    assert f"MISSED {DTYPE}" in done.stdout


OPTIONS = {"context": 512, "dtype": "float32", "block_size": 32, "skip_tokenizer_init": True}


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma3n", "llama4"])
def test_reads_are_counted_by_each_layers_own_reach(name, tmp_path):
    """Windows, layers that read another's cache, chunks; one layer native; prompts prefilled in pieces."""
    lengths = [300, 17, 41]
    skip = {"turboquant": {"skip_layers": [1], "current": "compressed"}}
    options = OPTIONS | {"model": tiny_models.make(name, tmp_path), "max_num_batched_tokens": 64}
    with running(DTYPE, **options, additional_config=skip) as engine:
        before = counters()
        for i, length in enumerate(lengths):
            engine.prefill(tiny_models.prompt(length, seed=i))
        after = counters()
        check_all_compressed(engine, before, after, lengths)
        layers = [x for x in attention_layers(engine).values() if x.kv_cache_dtype == DTYPE]
        assert 0 < len(layers) < len(attention_layers(engine))
        for layer in layers[:2]:  # of each model's first two, one has a window or a chunk, if any layer has
            own = layer.impl.sliding_window
            layer.impl.sliding_window = own - 1 if own else 299
            chunked = getattr(layer, "attention_chunk_size", 0)
            if chunked:
                layer.impl.sliding_window, layer.attention_chunk_size = own, chunked - 1
            with pytest.raises(RuntimeError, match="another kernel ran, or a layer"):
                check_all_compressed(engine, before, after, lengths)
            layer.impl.sliding_window = own
            if chunked:
                layer.attention_chunk_size = chunked
        check_all_compressed(engine, before, after, lengths)


def cut_off(x: torch.Tensor, scale: float) -> torch.Tensor:
    """e4m3 towards zero, as vLLM's CPU kernel stores it."""
    codes = (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    too_far = (codes.float().abs() > x.float().abs() / scale).to(torch.uint8)
    return ((codes.view(torch.uint8) - too_far).view(torch.float8_e4m3fn).float() * scale).to(x.dtype)


def test_the_simulated_fp8_cache_is_vllms(monkeypatch):
    """vLLM's CPU engine has a real one where the processor has AVX-512. But for the rounding, it is the simulated one."""
    if not torch.cpu._is_avx512_supported():
        pytest.skip("vLLM has no fp8 cache on this processor")
    windows = windows_of(MODEL, "code", 1, 500)
    targets = windows[0][1:]
    with running(None) as engine:
        base = engine.prefill(windows[0])
        with simulated.stored_through(engine, simulated.unit_scale):
            nearest = engine.prefill(windows[0])
        monkeypatch.setattr(simulated, "rounded", cut_off)
        with simulated.stored_through(engine, simulated.unit_scale):
            ours = engine.prefill(windows[0])
        again = engine.prefill(windows[0])
        num_bytes = simulated.bytes_per_token(engine, simulated.FP8)
    assert torch.equal(base, again), "the hooks must be gone"
    with running(None, kv_cache_dtype="fp8") as engine:
        real = engine.prefill(windows[0])
        apart = compare(engine, real, ours, targets).kl
        quality = [compare(engine, base, x, targets).kl for x in (nearest, ours, real)]
        assert reads.bytes_per_token(engine) == num_bytes
    print("nearest, cut off, real:", quality, "apart", apart)
    assert quality[1] == pytest.approx(quality[2], rel=0.1)
    assert apart < 0.2 * quality[2]
    assert quality[0] < 0.5 * quality[2]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """Gemma 3 with windows of 40 tokens, and a tokenizer with <bos> and token 0 as padding, as Gemma's."""
    folder = tiny_models.make("gemma3", tmp_path_factory.mktemp("foreign"))
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *map(chr, range(32, 32 + tiny_models.VOCABULARY - 4))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def test_a_foreign_model_is_evaluated(foreign, tmp_path):
    text = tmp_path / "words.txt"
    text.write_text("".join(chr(33 + (i * i + i // 7) % 90) for i in range(2000)))
    done = tq_eval(
        "--text", "code", str(text), "--formats", "fp8", *PEERS, DTYPE, "--windows", "3", "--window", "256",
        "--needles", "300", "--keys", "2", "--greedy", "--skip-layers", "0", "5", "--json", str(tmp_path / "out.json"),
        "--plot", str(tmp_path / "out.svg"), model=foreign,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = json.loads((tmp_path / "out.json").read_text())
    found = {(row["text"], row["cache"]): row for row in rows}
    assert len(found) == len(rows) == 2 * (3 + len(PEERS))
    for name in ("code", str(text)):
        bf16, fp8, four = (found[name, cache] for cache in ("bf16", "fp8", DTYPE))
        assert bf16["kl"] == 0 and bf16["top1"] == 1 and bf16["bytes_per_token"] == 6 * 2 * 2 * 32 * 2
        assert fp8["bytes_per_token"] * 2 == bf16["bytes_per_token"] and fp8["note"].startswith("simulated, ")
        assert 0 < fp8["kl"] < four["kl"] and 0 < four["top1"] < 1
        assert all(found[name, peer]["kl"] > fp8["kl"] and found[name, peer]["note"] == "simulated" for peer in PEERS)
        assert four["skip_layers"] == [0, 5] and four["against"]["format"] == "fp8"
        native_bytes, own_bytes = 2 * 2 * 2 * 32 * 2, 4 * 2 * (16 + 2 + 16 + 4)
        assert four["bytes_per_token"] == native_bytes + own_bytes
        assert four["kl_se"] > 0 and len(four["window_kl"]) == 3 and 0 <= four["greedy"] <= 200
        assert four["needles"]["300"].endswith("/2")
    assert (tmp_path / "out.svg").read_text().count("<circle") == 2 * (2 + len(PEERS))
    assert "start of an engine" in done.stderr  # progress
