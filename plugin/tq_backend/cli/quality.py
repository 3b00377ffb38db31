"""`tq eval`: how far each format moves a model's predictions from a native bf16 cache.

Mean KL(bf16 || format) over the full vocabulary at every position of windows of held-out text, in compressed mode: every
attended token, the current ones too, comes from a compressed page. The library's counters are compared with the exact number
of (query, key) pairs. Beside it the perplexity, the share of equal most likely tokens, and tasks that are asked for.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from tq_backend._library import native
from tq_backend.cli import pareto, simulated
from tq_backend.cli.arguments import parse_format, parse_positive
from tq_backend.cli.engine import own_context
from tq_backend.cli.evaluation import Evaluation, Wanted
from tq_backend.cli.heldout import CODE, PROSE
from tq_backend.cli.peers import PEERS
from tq_backend.cli.read_config import config_file
from tq_backend.cli.results import write_results
from tq_backend.cli.rows import HEAD, Row, line_of
from tq_backend.cli.tasks import GREEDY_TOKENS

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
DEFAULT_LAYERS = "default"


def misses(wanted: Wanted, row: Row) -> list[str]:
    """A sentence for each bar of the small model that the row misses; notes the bar in the row."""
    found = []
    reference = REFERENCE_KL.get(row.cache)
    full = (row.text, wanted.windows, wanted.window, wanted.skip_layers) == (CODE, 8, 4096, [])
    if reference is not None and full:
        row.bar = f"{reference} +-{KL_TOLERANCE:.0%}"
        if abs(row.kl / reference - 1) > KL_TOLERANCE:
            found.append(f"{row.cache}: mean KL {row.kl:.5f} is not within 10 % of {reference}")
    if row.decode_kl is not None and abs(row.decode_kl / row.decode_prefill_kl - 1) > DECODE_TOLERANCE:
        found.append(
            f"{row.cache}: decode's KL {row.decode_kl:.5f} is not within 5 % of prefill's {row.decode_prefill_kl:.5f}"
        )
    return found


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


def evaluate(
    wanted: Wanted, say: Callable[[str], None], save: Callable[[list[Row]], None]
) -> tuple[list[Row], list[str]]:
    """Rows, and a sentence for each missed bar. Says each row when it is measured, and saves what there is so far."""
    found: list[str] = []
    evaluation = Evaluation(wanted)
    bars = has_bars(wanted.model)
    say(f"{wanted.model.resolve().name}: {wanted.windows} windows of {wanted.window} tokens of each text\n{HEAD}")
    for row in evaluation.run():
        if bars:
            found += misses(wanted, row)
        say(line_of(row))
        save(evaluation.rows)
    return evaluation.rows, found


def parse_cache(text: str) -> str:
    return text if text in simulated.SIMULATED else parse_format(text)


def parse_layer(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [row["name"] for row in native().formats() if not row["test_only"]]
    parser.add_argument(
        "--model",
        default="models/tiny-code-lm",
        help="a model's folder, or its Hugging Face name if it is in the local cache; default: the repository's small model, the "
        "only one with bars",
    )
    parser.add_argument(
        "--formats",
        nargs="+",
        type=parse_cache,
        default=names,
        metavar="NAME",
        help=f"{', '.join(names)} (these by default); simulated, {simulated.FP8} (e4m3, the better of scale 1.0 and calibrated "
        f"scales) and {', '.join(PEERS)}",
    )
    parser.add_argument(
        "--text",
        nargs="+",
        default=[CODE],
        metavar="TEXT",
        help=f"each a text of its own: {CODE} (default), the source of the installed package anyio; {PROSE}, a novel from a Debian "
        "package; a file; a folder",
    )
    parser.add_argument("--windows", type=parse_positive, default=8, help="bars apply to 8 windows of 4096 tokens")
    parser.add_argument("--window", type=parse_positive, default=4096, help="tokens, 2 or more")
    parser.add_argument(
        "--skip-layers",
        nargs="+",
        default=[],
        type=parse_layer,
        metavar="LAYER",
        help=f"layers that keep the native cache, by number or kind; '{DEFAULT_LAYERS}': those that each format has; default: none",
    )
    parser.add_argument(
        "--against", type=parse_cache, help=f"compare with this format's KL; default: {simulated.FP8}, if asked for"
    )
    parser.add_argument("--decode", action="store_true", help="repeat the first window token by token")
    parser.add_argument(
        "--needles",
        nargs="+",
        type=parse_positive,
        default=[],
        metavar="TOKENS",
        help="hide keys in prompts of these lengths",
    )
    parser.add_argument("--keys", type=parse_positive, default=8, help="keys to hide, in a prompt each")
    parser.add_argument(
        "--greedy",
        action="store_true",
        help=f"continue each window's beginning by {GREEDY_TOKENS} tokens, as bf16 does or not",
    )
    parser.add_argument("--json", type=Path, help="write the figures there, after each cache")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw KL against bytes per token")
    parser.add_argument(
        "--from",
        dest="results",
        nargs="+",
        type=Path,
        metavar="FILE.json",
        help="measure nothing; --plot what --json wrote earlier",
    )


def wanted_of(args: argparse.Namespace) -> Wanted:
    """Raises ValueError with a sentence for what cannot be measured."""
    if args.window < 2:
        raise ValueError("--window is 1; perplexity needs 2 tokens or more")
    if args.greedy and args.window <= GREEDY_TOKENS:
        raise ValueError(
            f"--window is {args.window}; with --greedy it must be more than the {GREEDY_TOKENS} tokens to generate"
        )
    model = model_folder(args.model)
    context = own_context(model)
    longest = max([args.window, *args.needles])
    if context is not None and longest > context:
        raise ValueError(f"{longest} tokens were asked for; {args.model} is made for {context}")
    formats = list(dict.fromkeys(args.formats))
    against = args.against or (simulated.FP8 if simulated.FP8 in formats else None)
    if against is not None and against not in formats:
        raise ValueError(f"--against is {against}, which is not among --formats {' '.join(formats)}")
    if DEFAULT_LAYERS in args.skip_layers and len(args.skip_layers) > 1:
        raise ValueError(f"--skip-layers has '{DEFAULT_LAYERS}' and others; it must be that alone, or layers")
    return Wanted(
        model, formats, list(dict.fromkeys(args.text)), args.windows, args.window,
        None if args.skip_layers == [DEFAULT_LAYERS] else args.skip_layers,
        against, args.decode, args.needles, args.keys, args.greedy,
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    try:
        if args.results:
            if args.plot is None:
                raise ValueError("--from needs --plot FILE.svg")
            pareto.write(args.plot, pareto.read_rows(args.results))
            return 0
        wanted = wanted_of(args)

        def save(rows: list[Row]) -> None:
            if args.json is not None:
                write_results(args.json, rows)

        rows, missed = evaluate(wanted, lambda line: tqdm.write(line, file=sys.stdout), save)
        if args.plot is not None:
            pareto.write(args.plot, [vars(row) for row in rows])
    except (
        OSError,
        RuntimeError,
        ValueError,
        NotImplementedError,
    ) as error:  # the engine's too, which takes not every model
        print(f"tq eval: {error}")
        return 2
    for miss in missed:
        print(f"MISSED {miss}")
    return 1 if missed else 0
