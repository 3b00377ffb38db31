"""`tq eval`: how far each format moves the model's predictions from a native bf16 cache.

Mean KL(bf16 || format) over the full vocabulary at every position of windows of held-out text, in compressed mode: every
attended token, the current ones too, comes from a compressed page. The library's counters are compared with the exact number
of (query, key) pairs. One window is repeated token by token through decode.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from tq_backend.cli.arguments import parse_format, parse_positive
from tq_backend.cli.engine import Engine, counters
from tq_backend.cli.heldout import heldout_tokens
from tq_backend.cli.read_config import config_file
from tq_backend.cli.results import Figure, write_results

# Mean KL on tiny-code-lm of an independent PyTorch implementation of the same math, 8 windows of 4,096 tokens.
REFERENCE_KL = {
    "turboquant_k8v4": 0.0085,
    "turboquant_4bit_nc": 0.0150,
    "turboquant_k3v4_nc": 0.0373,
    "turboquant_3bit_nc": 0.0628,
}
# The weights that the bars are for.
REFERENCE_WEIGHTS = "2f83c6729bc5ac487fece890cb6280e31448098848234b55bfecd9ec69840d45"
KL_TOLERANCE = 0.10  # relative, both sides: an implementation that is better than the math is wrong too
DECODE_TOLERANCE = 0.05  # relative, decode's KL against the same window's prefill
POSITIONS_AT_ONCE = 512


@dataclass
class Quality:
    kl: float
    perplexity: float


def compare(engine: Engine, base: torch.Tensor, hidden: torch.Tensor, targets: list[int]) -> tuple[float, float]:
    """Sums over positions of KL(base || hidden) and of the negative log likelihood of targets (one shorter is allowed)."""
    kl = nll = 0.0
    for start in range(0, len(hidden), POSITIONS_AT_ONCE):
        p = engine.log_probs(base[start : start + POSITIONS_AT_ONCE])
        q = engine.log_probs(hidden[start : start + POSITIONS_AT_ONCE])
        kl += (p.exp() * (p - q)).sum().item()
        want = torch.tensor(targets[start : start + len(q)])
        nll -= q[torch.arange(len(want)), want].sum().item()
    return kl, nll


def measure(
    engine: Engine, base: list[torch.Tensor], windows: list[list[int]], progress: tqdm
) -> tuple[Quality, float]:
    """Quality over all windows, and the KL of the first one alone over its positions but the last."""
    kl = nll = 0.0
    positions = targets = 0
    first = 0.0
    for index, (tokens, reference) in enumerate(zip(windows, base, strict=True)):
        hidden = engine.prefill(tokens)
        window_kl, window_nll = compare(engine, reference, hidden, tokens[1:])
        kl, nll = kl + window_kl, nll + window_nll
        positions, targets = positions + len(tokens), targets + len(tokens) - 1
        if index == 0:
            first = compare(engine, reference[:-1], hidden[:-1], tokens[1:])[0] / (len(tokens) - 1)
        progress.update()
    return Quality(kl / positions, float(torch.tensor(nll / targets).exp())), first


def check_all_compressed(engine: Engine, before: dict[str, int], lengths: list[int]) -> None:
    """Every query of a causal window sees every token up to its own, in each layer, and all of them from pages."""
    want = engine.num_layers * sum(n * (n + 1) // 2 for n in lengths)
    got = counters()["compressed_kv_reads"] - before["compressed_kv_reads"]
    if got != want:
        raise RuntimeError(
            f"the kernels read {got} compressed tokens where attention needed {want}: another kernel ran"
        )


def evaluate(
    model: Path, formats: list[str], num_windows: int, window: int, decode: bool
) -> tuple[list[Figure], list[str]]:
    """Figures, and a sentence for each that misses its bar."""
    text = heldout_tokens(model, num_windows * window)
    windows = [text[i * window : (i + 1) * window] for i in range(num_windows)]
    figures: list[Figure] = []
    misses: list[str] = []
    bars = has_bars(model)
    full = bars and (num_windows, window) == (8, 4096)
    with tqdm(total=num_windows * (1 + len(formats)), unit="window", desc="bf16") as progress:
        engine = Engine(model, None, window)
        base = [engine.prefill(tokens) for tokens in windows]
        quality, _ = Quality(0, 0), 0
        nll = sum(compare(engine, h, h, t[1:])[1] for h, t in zip(base, windows, strict=True))
        base_perplexity = float(torch.tensor(nll / (num_windows * (window - 1))).exp())
        figures.append(Figure("perplexity, bf16", base_perplexity, "1"))
        progress.update(num_windows)
        engine.close()
        for name in formats:
            progress.set_description(name)
            engine = Engine(model, name, window)
            before = counters()
            quality, first = measure(engine, base, windows, progress)
            check_all_compressed(engine, before, [len(t) for t in windows])
            reference = REFERENCE_KL.get(name) if full else None
            bar = "" if reference is None else f"{reference} +-{KL_TOLERANCE:.0%}"
            figures.append(Figure(f"mean KL(bf16 || {name})", quality.kl, "nat", bar, "stock vLLM, bf16 cache"))
            figures.append(Figure(f"perplexity, {name}", quality.perplexity, "1", "", f"bf16 {base_perplexity:.4f}"))
            if reference is not None and abs(quality.kl / reference - 1) > KL_TOLERANCE:
                misses.append(f"{name}: mean KL {quality.kl:.5f} is not within 10 % of {reference}")
            if decode:
                tokens = windows[0]
                before = counters()
                hidden = engine.decode_forced(tokens)
                check_all_compressed(engine, before, [len(tokens) - 1])
                decode_kl = compare(engine, base[0][:-1], hidden, tokens[1:])[0] / len(hidden)
                figures.append(
                    Figure(
                        f"mean KL through decode, {name}",
                        decode_kl,
                        "nat",
                        f"prefill +-{DECODE_TOLERANCE:.0%}" if bars else "",
                        f"prefill of the same window {first:.5f}",
                    )
                )
                if bars and abs(decode_kl / first - 1) > DECODE_TOLERANCE:
                    misses.append(f"{name}: decode's KL {decode_kl:.5f} is not within 5 % of prefill's {first:.5f}")
            engine.close()
    return figures, misses


def has_bars(model: Path) -> bool:
    """Whether it is the model that the reference figures are of, whatever its folder is called."""
    weights = model / "model.safetensors"
    return weights.is_file() and hashlib.sha256(weights.read_bytes()).hexdigest() == REFERENCE_WEIGHTS


def model_folder(name: str) -> Path:
    """Raises ValueError if there is no model to load."""
    folder = config_file(name, "--model").parent
    missing = [] if (folder / "tokenizer.json").is_file() else ["tokenizer.json"]
    if not any(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise ValueError(f"--model {name}: there is no {' and no '.join(missing)} in {folder}")
    return folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="models/tiny-code-lm",
        help="a model's folder, or its Hugging Face name if it is in the local cache; default: the repository's small model, the "
        "only one with bars",
    )
    parser.add_argument("--formats", nargs="+", type=parse_format, default=list(REFERENCE_KL))
    parser.add_argument("--windows", type=parse_positive, default=8, help="bars apply to 8 windows of 4096 tokens")
    parser.add_argument("--window", type=parse_positive, default=4096, help="tokens, 2 or more")
    parser.add_argument("--no-decode", action="store_true", help="leave out the token-by-token repetition")
    parser.add_argument("--json", type=Path, help="write the figures there")


def run(args: argparse.Namespace) -> int:
    try:
        if args.window < 2:
            raise ValueError("--window is 1; perplexity needs 2 tokens or more")
        model = model_folder(args.model)
        figures, misses = evaluate(model, args.formats, args.windows, args.window, not args.no_decode)
    except (
        OSError,
        RuntimeError,
        ValueError,
        NotImplementedError,
    ) as error:  # the engine's too, which takes not every model
        print(f"tq eval: {error}")
        return 2
    for figure in figures:
        print(f"{figure.figure:45s} {figure.value:10.5f} {figure.unit:4s} {figure.bar:14s} {figure.baseline}")
    if args.json is not None:
        write_results(args.json, figures)
    for miss in misses:
        print(f"MISSED {miss}")
    return 1 if misses else 0
