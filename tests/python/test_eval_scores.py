"""`tq eval`'s arithmetic: scores and their errors, counts of reads, rounding to fp8, the plot."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from tq_backend.cli import pareto, peers, reads, scores, simulated, tasks
from tq_backend.cli.main import main

SEED = 20261128


@pytest.mark.parametrize("round_", range(200))
def test_attended_tokens_are_those_of_the_masks(round_):
    rng = random.Random(SEED + round_)
    length, window = rng.randrange(0, 60), rng.choice([0, 0, 1, rng.randrange(1, 80)])
    chunk = 0 if window else rng.choice([0, 1, rng.randrange(1, 80)])
    want = sum(
        1
        for query in range(length)
        for key in range(query + 1)
        if (not window or query - key < window) and (not chunk or query // chunk == key // chunk)
    )
    assert reads.attended(length, window, chunk) == want, (length, window, chunk)


class Linear:
    """Predictions from hidden states by one matrix."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix

    def log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        return (hidden @ self.matrix).log_softmax(-1)


def test_scores_are_the_definitions():
    torch.manual_seed(SEED)
    positions = 2 * scores.POSITIONS_AT_ONCE + 5
    engine = Linear(torch.randn(8, 50))
    base = torch.randn(positions, 8)
    hidden = base + 0.3 * torch.randn(positions, 8)
    targets = torch.randint(50, (positions - 1,)).tolist()
    ticks: list[int] = []
    found = scores.compare(engine, base, hidden, targets, ticks.append)
    p, q = ((x.double() @ engine.matrix.double()).softmax(-1) for x in (base, hidden))
    assert found.kl == pytest.approx((p * (p / q).log()).sum().item() / positions, rel=1e-4)
    nll = [-math.log(q[i, token].item()) for i, token in enumerate(targets)]
    assert found.nll == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    assert found.top1 == (p.argmax(-1) == q.argmax(-1)).sum().item() / positions and 0 < found.top1 < 1
    assert sum(ticks) == positions
    itself = scores.compare(engine, base, base, targets)
    assert (itself.kl, itself.top1) == (0.0, 1.0) and itself.nll != found.nll


def test_errors_are_over_windows_and_pairs():
    base, ours = [1.0, 2.0, 3.0, 4.0], [0.5, 1.2, 1.4, 2.1]
    assert scores.standard_error(base) == pytest.approx(math.sqrt(5 / 3) / 2)
    assert scores.standard_error([1.0]) is None and scores.upper95(1.0, None, 1) is None
    found = scores.paired("fp8", base, ours)
    assert found.difference == pytest.approx(-1.2)
    assert found.difference_se == pytest.approx(torch.tensor([-0.5, -0.8, -1.6, -1.9]).std().item() / 2)
    assert found.ratio == pytest.approx(0.52)
    # Four windows that are all twice as bad are twice as bad, however unlike each other they are.
    assert scores.paired("fp8", base, [2 * x for x in base]).ratio_upper95 == pytest.approx(2.0)
    residual = torch.tensor([x - 0.52 * y for x, y in zip(ours, base, strict=True)], dtype=torch.float64)
    assert found.ratio_upper95 == pytest.approx(0.52 + 2.353 * residual.std().item() / 2 / 2.5)


def test_an_upper_limit_is_above_the_truth_19_times_of_20():
    torch.manual_seed(SEED)
    draws = torch.randn(4000, 3, dtype=torch.float64)
    above = [scores.upper95(x.mean().item(), scores.standard_error(x.tolist()), 3) > 0 for x in draws]
    assert abs(sum(above) / len(above) - 0.95) < 0.015


def test_fp8_is_the_nearest_number_of_its_own():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = codes[codes.isfinite()].unique()
    torch.manual_seed(SEED)
    x = torch.cat([torch.randn(2000) * 10 ** torch.empty(2000).uniform_(-3, 3), torch.tensor([1e6, -1e6, 0.0])])
    for scale in (1.0, 0.37):
        exact = x.double() / scale
        got = simulated.rounded(x, scale).double() / scale
        nearest = (exact[:, None] - numbers).abs().amin(-1)
        assert ((got - exact).abs() <= nearest + 1e-6 * exact.abs()).all()
    assert simulated.rounded(torch.tensor([874.0]), 1.0).item() == 448.0  # saturated, not a NaN


def vectors(dim: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED + dim)
    sizes = 10 ** torch.empty(400, 1).uniform_(-3, 3, generator=generator)
    x = torch.randn(400, dim, generator=generator) * sizes
    x[7], x[8, : dim // 2] = 0.0, 0.0
    return x


def sylvester(dim: int) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < dim:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


FP4 = sorted({s * m for s in (1, -1) for m in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)})


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_nvfp4_takes_the_nearest_number_in_each_block(dim):
    x = vectors(dim)
    got = peers.nvfp4(x)
    for row, out in zip(
        x.unflatten(-1, (-1, 16)).flatten(0, 1), got.unflatten(-1, (-1, 16)).flatten(0, 1), strict=True
    ):
        scale = (row.abs().max() / 6).clamp(max=448).to(torch.float8_e4m3fn).double()
        nearest = (row.double()[:, None] - torch.tensor(FP4, dtype=torch.float64) * scale).abs().amin(-1)
        torch.testing.assert_close((row.double() - out.double()).abs(), nearest, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_int4_has_sixteen_even_steps_of_the_rotated_vector(dim):
    from vllm.v1.attention.ops.int4_per_token_head import single_rht

    h = sylvester(dim)
    signs = single_rht(torch.eye(dim), inverse=False)[:, 0].double()  # the first row of H has ones only
    x = vectors(dim)
    turned, out = (y.double() * signs @ h for y in (x, peers.int4_per_token_head(x)))
    step = (turned.amax(-1) - turned.amin(-1)) / 15
    steps_off = (out - turned).abs() / step.clamp(min=1e-6)[:, None]
    assert (steps_off <= 1.01).all()  # half a step of the code, and at an end half a step of the zero point
    assert (steps_off <= 0.51).double().mean() > 0.95
    assert all(len(row.mul(2**12).round().unique()) <= 16 for row in out / step[:, None].clamp(min=1e-9))


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_ultraquant_rotates_keys_and_not_values(dim):
    """A vector with one element: as a value nothing else comes out; as a key it is spread evenly, all in one step of FP4."""
    x = torch.zeros(1, dim)
    x[0, 5] = 8.0
    value, key = peers.ultraquant_4bit(x, False), peers.ultraquant_4bit(x, True)
    assert value.count_nonzero() == 1 and abs(value[0, 5] - 8) <= 2  # 0.156 * 8 becomes 1, whose largest number is 6
    assert (key - x).norm() < 0.3 * x.norm()
    x = vectors(dim)
    for rotate in (False, True):  # FP4 with powers of two as scales
        error = (peers.ultraquant_4bit(x, rotate) - x).square().sum(-1) / x.square().sum(-1).clamp(min=1e-30)
        assert 0.005 < error.mean() < 0.03


def test_bytes_of_other_caches():
    """vLLM's own sizes: 136 bytes of UltraQuant (format.py), nvfp4_kv_cache_full_dim, and a float for each int4 vector."""
    from vllm.utils.torch_utils import nvfp4_kv_cache_full_dim

    sizes = {name: of_vector for name, (_, _, of_vector) in peers.PEERS.items()}
    assert 2 * sizes["ultraquant_4bit"](128) == 136 and 2 * sizes["ultraquant_4bit"](256) == 272
    assert all(sizes["nvfp4"](dim) == nvfp4_kv_cache_full_dim(dim) for dim in (64, 128, 256))
    assert sizes["int4_per_token_head"](128) == 64 + 4


def test_agreement_ends_at_the_first_difference():
    assert tasks.agreeing([[1, 2, 3, 4], [1, 2, 3, 4]], [[1, 2, 9, 4], [1, 2, 3, 4]]) == 3.0


ROWS = [
    {"model": "m", "text": text, "cache": cache, "bytes_per_token": size, "kl": kl}
    for text in ("code", "prose")
    for cache, size, kl in (
        ("bf16", 512, 0.0),
        ("fp8", 256, 0.02),
        ("turboquant_k8v4", 196, 0.03),
        ("turboquant_4bit_nc", 132, 1.5),
        ("tq_8", 196, 0.005),
    )
]


def test_the_front_is_what_nothing_beats():
    points = [row for row in ROWS if row["text"] == "code" and row["kl"]]
    assert [row["cache"] for row in pareto.front(points)] == ["turboquant_4bit_nc", "tq_8"]


def test_the_plot_has_every_cache_where_it_belongs(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps(ROWS[:5]))
    (tmp_path / "b.json").write_text(json.dumps([row | {"model": "<other>"} for row in ROWS]))
    out = tmp_path / "x.svg"
    args = ["eval", "--plot", str(out), "--from", str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert main(args) == 0, capsys.readouterr().out
    tree = ElementTree.parse(out).getroot()
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in tree if c.tag.endswith("circle")]
    texts = [t.text for t in tree if t.tag.endswith("text")]
    assert len(circles) == 4 + 8
    assert texts.count("tq_8") == 3 and texts.count("4bit_nc") == 3 and texts.count("bf16") == 2
    assert {"m", "<other>", "code", "prose"} <= set(texts)
    # Of the last panel's first text, in the order of ROWS: more bytes to the right, more KL higher up.
    fp8, k8v4, four, eight = circles[-4:]
    assert four[0] < k8v4[0] == eight[0] < fp8[0] and four[1] < k8v4[1] < fp8[1] < eight[1]
    width, height = float(tree.get("width")), float(tree.get("height"))
    assert all(0 < x < width and 0 < y < height for x, y in circles)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("[{}]", "is no list of what `tq eval --json` writes"), ("{", "Expecting"), ("[]", "nothing to plot")],
)
def test_a_plot_of_something_else(content, sentence, tmp_path: Path, capsys):
    (tmp_path / "a.json").write_text(content)
    assert main(["eval", "--plot", str(tmp_path / "x.svg"), "--from", str(tmp_path / "a.json")]) == 2
    assert sentence in capsys.readouterr().out
    assert main(["eval", "--from", str(tmp_path / "a.json")]) == 2
    assert "--from needs --plot" in capsys.readouterr().out
