"""README.md and docs/ quote the results files as they are, and the README's words name things that exist."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


readme_figures = script("readme_figures")

EMPTY = "before\n<!-- figures -->\nold\n<!-- end of figures -->\nafter\n"
ENTRY = {
    "figure": "KL(bf16 || x)",
    "value": 0.0150123,
    "unit": "nat",
    "bar": "0.0150 +-10%",
    "baseline": "bf16",
    "machine": "a CPU, 2 cores",
    "date": "2026-11-23",
    "command": "tq eval",
}


@pytest.mark.parametrize("name", ["README.md", *sorted(set(readme_figures.PAGE_OF.values()))])
def test_pages_are_up_to_date(name):
    text = (ROOT / name).read_text()
    assert readme_figures.rewritten(text, ROOT / "tests/bench/results", name) == text, "run ci/readme_figures.py"


def test_the_support_table_is_up_to_date_and_names_tests_that_exist():
    support = script("support_matrix")
    text = (ROOT / "README.md").read_text()
    assert support.rewritten(text) == text, "run ci/support_matrix.py"
    names = [
        "engine/test_models.py::test_values_narrower_than_keys",
        "engine/test_models.py::test_gone",
        "engine/gone.py::test_x",
    ]
    assert support.missing_tests(names, ROOT / "tests") == names[1:]


def test_a_results_file_is_on_one_page(tmp_path: Path):
    (tmp_path / "plans.json").write_text(json.dumps([ENTRY]))
    assert "Not measured yet." in readme_figures.rewritten(EMPTY, tmp_path)
    assert "`tq eval`" in readme_figures.rewritten(EMPTY, tmp_path, "docs/models.md")


def test_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    targets = [t for t in re.findall(r"\]\(([^)]+)\)", text) if not t.startswith(("http", "#"))]
    assert targets
    assert [t for t in targets if not (ROOT / t).exists()] == []


def test_figures_replace_the_block_and_nothing_else(tmp_path: Path):
    assert readme_figures.rewritten(EMPTY, tmp_path) == EMPTY.replace("old", "Not measured yet.")
    (tmp_path / "quality.json").write_text(json.dumps([ENTRY]))
    new = readme_figures.rewritten(EMPTY, tmp_path)
    assert "`tq eval` on a CPU, 2 cores, 2026-11-23:" in new
    assert r"| KL(bf16 \|\| x) | 0.01501 nat | 0.0150 +-10% | bf16 |" in new
    assert new.startswith("before\n") and new.endswith("after\n") and "old" not in new
    assert readme_figures.rewritten(new, tmp_path) == new


def test_what_eval_wrote_is_a_table_of_its_own(tmp_path: Path):
    common = {"machine": "a CPU, 2 cores", "date": "2026-11-28", "command": "tq eval", "windows": 2, "window": 2048}
    row = common | {"model": "m", "text": "prose", "cache": "fp8", "note": "simulated", "bytes_per_token": 256, "kl": 0.02,
                    "kl_se": None, "perplexity": 29.5, "top1": 0.9336, "against": None}  # fmt: skip
    ours = row | {"cache": "tq_8", "note": "", "kl_se": 0.0012, "against": {"format": "fp8", "ratio": 0.25}}
    (tmp_path / "real_models.json").write_text(json.dumps([row, ours]))
    new = readme_figures.rewritten(EMPTY, tmp_path, "docs/formats.md")
    assert "`tq eval` on a CPU, 2 cores, 2026-11-28, 2 windows of 2048 tokens:" in new
    assert "| m | prose | fp8 (simulated) | 256 | 0.0200 | 29.5 | 93.36% |  |" in new
    assert "| m | prose | tq_8 | 256 | 0.0200 +-0.0012 | 29.5 | 93.36% | 0.25 times fp8's |" in new


def test_a_malformed_entry_is_refused(tmp_path: Path):
    (tmp_path / "x.json").write_text(json.dumps([{k: v for k, v in ENTRY.items() if k != "machine"}]))
    with pytest.raises(ValueError, match=r"x\.json"):
        readme_figures.rewritten(EMPTY, tmp_path)
    with pytest.raises(ValueError, match="0 blocks"):
        readme_figures.rewritten("no markers\n", tmp_path / "none")


def test_the_table_of_formats_is_of_both_files(tmp_path):
    answers = [{"model": "m", "text": text, "cache": cache, "kl": kl} for text, cache, kl in
               (("prose", "bf16", 0.0), ("prose", "fp8", 0.05), ("prose", "tq_8", 0.01), ("code", "tq_8", 0.02))]  # fmt: skip
    figures = {"decode step, ours tq_8, batch 32, context 32000": 3.785, "KV tokens in 60% of the GPU, ours tq_8": 7013968,
               "decode step, fp8, batch 32, context 32000": 6.356, "KV tokens in 60% of the GPU, fp8": 5369040}  # fmt: skip
    files = [tmp_path / "answers.json", tmp_path / "engine.json"]
    files[0].write_text(json.dumps(answers))
    files[1].write_text(json.dumps([{"figure": figure, "value": value} for figure, value in figures.items()]))
    lines = readme_figures.formats_table(*files).splitlines()
    assert lines[0] == "| cache | bytes | m, prose | m, code | step, ms | KV tokens |"
    assert (
        "| fp8 | 256 | 0.0500 |  | 6.36 | 5.4 M |" in lines
        and "| tq_8 | 196 | 0.0100 | 0.0200 | 3.79 | 7.0 M |" in lines
    )
    assert all(line.count("|") == 7 for line in lines)
