"""`tq eval` and `tq bench` where they cannot run or are given something else than usual. That they measure right is tested with the
engine (tests/engine/test_quality.py)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tq_backend.cli import bench, evaluation, quality, simulated
from tq_backend.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "tiny-code-lm"
MISSING = "import sys; sys.modules[{name!r}] = None; from tq_backend.cli.main import main; sys.exit(main({args!r}))"


@pytest.mark.parametrize("command", ["eval", "bench"])
@pytest.mark.parametrize("name", ["torch", "vllm"])
def test_without_torch_or_vllm(command, name):
    args = [command] + (["--model", str(MODEL), "--windows", "1", "--window", "16"] if command == "eval" else [])
    done = subprocess.run(
        [sys.executable, "-c", MISSING.format(name=name, args=args)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"tq {command}: ") and "it needs torch and vLLM" in last and name in last
    assert "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("command", ["eval", "bench"])
def test_a_misspelt_format(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--formats", "turboquant_4bit"])
    assert stopped.value.code == 2
    assert "there is no KV format 'turboquant_4bit'; it must be one of turboquant_k8v4, " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "bench"])
@pytest.mark.parametrize("value", ["0", "-1", "x", str(2**40)])
def test_numbers_that_are_none(command, value, capsys):
    flag = "--window" if command == "eval" else "--context"
    with pytest.raises(SystemExit) as stopped:
        main([command, f"{flag}={value}"])
    assert stopped.value.code == 2
    assert "is not a whole number from 1 to " in capsys.readouterr().err


def evaluated(capsys, *args) -> str:
    """The one sentence of an evaluation that does not begin."""
    assert main(["eval", *args]) == 2
    out = capsys.readouterr().out
    assert out.startswith("tq eval: ") and out.count("\n") == 1, out
    return out


def test_eval_outside_the_repository(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "--model 'models/tiny-code-lm' cannot be read: there is no such file" in evaluated(capsys)


def test_eval_of_a_name_that_is_not_in_the_cache(capsys):
    assert "no such model in the local Hugging Face cache" in evaluated(capsys, "--model", "nobody/nothing")


def test_eval_of_a_folder_without_a_model(tmp_path, capsys):
    shutil.copy(MODEL / "config.json", tmp_path)
    assert f"there is no tokenizer.json and no *.safetensors in {tmp_path}" in evaluated(
        capsys, "--model", str(tmp_path)
    )


def test_eval_of_more_text_than_there_is(capsys):
    sentence = evaluated(capsys, "--model", str(MODEL), "--windows", "1000000", "--window", "4096")
    assert "4096000000 were asked for" in sentence


def test_eval_of_one_token(capsys):
    assert "--window is 1" in evaluated(capsys, "--model", str(MODEL), "--window", "1")


def test_eval_of_what_is_not_among_the_formats(capsys):
    args = ("--model", str(MODEL), "--formats", "turboquant_k8v4", "--against", "fp8")
    assert "--against is fp8, which is not among --formats turboquant_k8v4" in evaluated(capsys, *args)


def test_eval_beyond_the_models_context(capsys):
    assert "8192 tokens were asked for" in evaluated(capsys, "--model", str(MODEL), "--needles", "8192")


def test_eval_of_windows_that_greedy_generation_fills(capsys):
    assert "--window is 200" in evaluated(capsys, "--model", str(MODEL), "--window", "200", "--greedy")


def test_eval_of_no_text(capsys):
    args = ("--model", str(MODEL), "--text", "nowhere/at/all")
    assert "--text nowhere/at/all: there is no such file" in evaluated(capsys, *args)


def test_eval_of_layers_and_the_default(capsys):
    args = ("--model", str(MODEL), "--skip-layers", "default", "1")
    assert "--skip-layers has 'default' and others" in evaluated(capsys, *args)


class EngineThatIsFarOff:
    """In place of a vLLM: its predictions with a compressed cache have nothing to do with those without."""

    def __init__(self, model, kv_format, window, skip_layers):
        self.shift = 0.0 if kv_format is None else 5.0
        self.model = torch.nn.Identity()

    def prefill(self, tokens):
        return torch.tensor(tokens).float()[:, None] % 7 + self.shift

    def decode_forced(self, tokens):
        return self.prefill(tokens)[:-1] * 3

    def log_probs(self, hidden):
        return (hidden * torch.linspace(-1, 1, 4096)).log_softmax(-1)

    def close(self):
        pass


@pytest.mark.parametrize("own", [True, False])
def test_bars_are_the_small_models(own, tmp_path, monkeypatch):
    """They hold for its weights, whatever their folder is called, and for no others."""
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    if not own:
        with (model / "model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))
    monkeypatch.setattr(evaluation, "Engine", EngineThatIsFarOff)
    monkeypatch.setattr(evaluation, "check_all_compressed", lambda *_: None)
    monkeypatch.setattr(evaluation, "bytes_per_token", lambda _: 1)
    monkeypatch.setattr(simulated, "attention_layers", lambda _: {})
    wanted = evaluation.Wanted(model, ["turboquant_4bit_nc"], decode=True)
    said, saved = [], []
    rows, misses = quality.evaluate(wanted, said.append, lambda rows: saved.append(len(rows)))
    assert [row.cache for row in rows] == ["bf16", "turboquant_4bit_nc"] and saved == [1, 2] and len(said) == 3
    assert len(misses) == (2 if own else 0)
    assert bool(rows[1].bar) == own


@pytest.mark.parametrize(("batch", "context"), [(1, 1000), (3, 1000), (2, 1), (4, 128), (2, 129)])
def test_benchs_tokens_lie_in_its_pages(batch, context):
    _, lens, table, slots = bench.batch_tables(batch, context)
    assert len(slots) == batch * context == len(set(slots.tolist()))
    assert lens.tolist() == [context] * batch
    for i in range(batch):
        for t in (0, context // 2, context - 1):
            page, inside = divmod(slots[i * context + t].item(), bench.BLOCK_SIZE)
            assert page == table[i, t // bench.BLOCK_SIZE].item() and inside == t % bench.BLOCK_SIZE
    assert slots.max() < table.numel() * bench.BLOCK_SIZE


def test_bench_of_a_context_that_is_no_multiple_of_a_page(monkeypatch, capsys):
    monkeypatch.setattr(bench, "CACHE_BYTES", 1)
    assert main(["bench", "--context", "1000", "--batches", "3", "--rounds", "2"]) in (
        0,
        1,
    )  # 1: not as fast as the stock kernel
    assert "batch 3, context 1000" in capsys.readouterr().out


def test_bench_of_more_than_the_memory_holds(capsys):
    assert main(["bench", "--context", str(2**31 - 1), "--batches", "1000000"]) == 2
    assert "needs about " in capsys.readouterr().out


def test_bench_without_cpu_kernels(monkeypatch, capsys):
    monkeypatch.setattr(torch.ops, "_C", object())
    assert main(["bench", "--rounds", "1"]) == 2
    assert "has no CPU attention to compare with" in capsys.readouterr().out
