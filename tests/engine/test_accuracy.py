"""A preset that is known to lose accuracy on a model is named when an engine starts, and nothing else of that is said or done."""

from __future__ import annotations

import logging

import pytest
import tiny_models
from engines import running
from tq_backend.vllm_adapter import accuracy, page_plan

DTYPE = "turboquant_4bit_nc"
OPTIONS = {"dtype": "float32", "context": 128, "skip_tokenizer_init": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.make("qwen2", tmp_path_factory.mktemp("models"))


@pytest.fixture
def said(monkeypatch) -> list[tuple[int, str]]:
    """See test_page_plan.py."""
    lines: list[tuple[int, str]] = []
    monkeypatch.setattr(page_plan, "say", lambda level, line: lines.append((level, line)))
    return lines


def losses(model, said, **options) -> list[tuple[int, str]]:
    said.clear()
    with running(options.pop("dtype_of_cache", DTYPE), model=model, **OPTIONS | options):
        return [(level, line) for level, line in said if "known to lose accuracy" in line]


def skip(*layers) -> dict:
    return {"additional_config": {"turboquant": {"skip_layers": list(layers)}}}


def test_an_engine_names_its_preset_once(model, said):
    proposed = " or ".join(
        f"--additional-config '{{\"turboquant\": {{{way}}}}}'"
        for way in ('"format": "tq_k5v4"', '"skip_layers": [0, 3, 5]')
    )
    line = f"{DTYPE} is known to lose accuracy on this model (key bias %s in layer %s): use {proposed}"
    assert losses(model, said) == [(logging.WARNING, line % (300, 0))]
    assert losses(model, said, additional_config={}) == [(logging.WARNING, line % (100, 3))]  # 0, 1, 4, 5 are native


def test_nothing_is_said_without_a_reason(model, said):
    assert losses(model, said, **skip(0, 3, 5)) == []
    assert losses(model, said, load_format="dummy") == []
    assert losses(model, said, dtype_of_cache="turboquant_k8v4") == []
    assert losses(model, said, dtype_of_cache="tq_4") == []
    assert any(line.startswith("compressed: 6 of 6") for _, line in said)  # the lines of an engine are seen


def test_an_engine_that_does_not_ask_reads_no_weights(model, monkeypatch, said):
    monkeypatch.setattr(accuracy.key_bias, "read", lambda *_: pytest.fail("nothing of this may run"))
    assert losses(model, said, dtype_of_cache=None) == []


def test_a_model_from_a_hub_is_read_where_it_was_put(model, tmp_path, said, monkeypatch):
    """As huggingface_hub lays its cache out."""
    folder = tmp_path / "models--some--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots").mkdir()
    (folder / "snapshots" / "abc").symlink_to(model)
    found = []
    own = accuracy.line

    def from_the_hub(vllm_config, specs):
        monkeypatch.setattr(vllm_config.model_config, "model", "some/model")
        monkeypatch.setattr(vllm_config.load_config, "download_dir", str(tmp_path))
        found.append(accuracy.model_folder(vllm_config.model_config, str(tmp_path)))
        return own(vllm_config, specs)

    monkeypatch.setattr(accuracy, "line", from_the_hub)
    assert len(losses(model, said)) == 1
    assert found == [folder / "snapshots" / "abc"]
