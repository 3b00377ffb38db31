"""`tq plan`: how many tokens fit in a given memory, per format, and in pages of which sizes. Needs no GPU and no engine."""

from __future__ import annotations

import argparse
import json
import re
from itertools import pairwise
from pathlib import Path

from tq_backend import model_layers
from tq_backend._library import native

UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
NATIVE_FORMATS = ("auto", "fp8")
STRATEGIES = {
    "uniform": "one group, pages of their own sizes",
    "side_by_side": "pages of their own sizes side by side in a block",
    "equal_pages": "block sizes that make all pages equal",
    "padded_pages": "block sizes that make all pages nearly equal",
}
# Twice vLLM's default --max-num-batched-tokens of a server on a large GPU: with asynchronous scheduling two batches are under
# way, and a window's pages are freed behind them.
IN_FLIGHT_TOKENS = 2 * 8192
WORTH_A_LINE = 1.02  # times as many tokens


def parse_memory(text: str) -> int:
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2] not in UNITS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a memory size; write for example 24GiB (units: {', '.join(UNITS)[2:]})"
        )
    return int(float(match[1]) * UNITS[match[2]])


def parse_layers(text: str) -> list[int]:
    if text == "none":
        return []
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of layers; write for example 0,1,30,31, or none for none"
        )
    return [int(number) for number in text.split(",")]


def parse_positive(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def read_config(path: Path) -> dict:
    """A Hugging Face config.json, or the folder that holds one. Raises ValueError with a sentence."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--config {path} cannot be read as a config.json: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"--config {path} is not a config.json: it holds no object")
    return config


def plan(
    config: dict,
    format_name: str,
    block_size: int,
    memory: int,
    *,
    tp: int = 1,
    max_model_len: int | None = None,
    skip: list[int] | None = None,
    in_flight_tokens: int = IN_FLIGHT_TOKENS,
    blocks_per_state: int = 1,
    side_by_side: bool = False,
) -> dict:
    """The native plan_pages' result for a model, with `bytes_per_token` (of all layers that own a cache, without padding, and
    with a window's layers counted as if they kept every token) and, in `layers`, each layer's number and what it is."""
    text = model_layers.text_config(config)
    layers = model_layers.cache_layers(config, tp)
    skipped = model_layers.skip_layers(config, skip) if format_name not in NATIVE_FORMATS else []
    element = 1 if format_name == "fp8" else model_layers.DTYPE_BYTES[text["dtype"]]
    # A skipped layer keeps the model's dtype. fp8 and auto have no skipped layers.
    given = model_layers.plan_layers(layers, None if format_name in NATIVE_FORMATS else format_name, element, skipped)
    length = max_model_len or text.get("max_position_embeddings")
    if not isinstance(length, int):
        raise ValueError("the config has no max_position_embeddings; give --max-model-len")
    found = native().plan_pages(
        given,
        block_size,
        memory,
        max_model_len=length,
        max_in_flight_tokens=in_flight_tokens,
        blocks_per_state=blocks_per_state,
        side_by_side=side_by_side,
    )
    total = 0
    for layer, asked, row in zip(layers, given, found["layers"], strict=True):
        row["layer"] = layer.number
        row["spec"] = describe(layer, asked["format"] or ("fp8" if format_name == "fp8" else text["dtype"]))
        if layer.kv_sharing_target == -1 and not layer.state_bytes:
            total += (row["page_bytes"] - row["padding_bytes"]) // row["block_size"]
    return found | {"bytes_per_token": total, "max_model_len": length, "skipped": skipped}


def describe(layer: model_layers.CacheLayer, cache: str) -> str:
    if layer.state_bytes:
        return f"state of {layer.state_bytes} bytes"
    reach = f"window {layer.sliding_window}" if layer.sliding_window else "full"
    return f"{cache}, {reach}, {layer.num_kv_heads} x {layer.head_dim}"


def ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"; every second, third ... one as "0-10 by 2"."""
    if len(numbers) > 2 and len(steps := {b - a for a, b in pairwise(numbers)}) == 1:
        step = steps.pop()
        return f"{numbers[0]}-{numbers[-1]}" + (f" by {step}" if step > 1 else "")
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def waste_percent(found: dict) -> float:
    return 100 * found["waste_bytes"] / (found["blocks_per_sequence"] * found["bytes_per_block"])


def lines(name: str, found: dict) -> list[str]:
    """One format's plan as it is printed."""
    out = [
        f"{name}: {STRATEGIES[found['strategy']]}, {found['num_groups']} group{'s' * (found['num_groups'] > 1)}, "
        f"{found['num_blocks']} blocks of {found['bytes_per_block']} bytes, {found['kv_tokens']} KV tokens"
    ]
    kinds: dict[tuple, list[int]] = {}
    for row in found["layers"]:
        if row["page_bytes"]:
            key = (row["spec"], row["block_size"], row["page_bytes"], row["padding_bytes"])
            kinds.setdefault(key, []).append(row["layer"])
    width = max(len(key[0]) for key in kinds)
    out.append(f"  {'spec':{width}s} {'block size':>10s} {'page bytes':>11s} {'padding':>9s}  layers")
    for (spec, block_size, page, padding), numbers in kinds.items():
        size = "-" if spec.startswith("state") else str(block_size)
        out.append(f"  {spec:{width}s} {size:>10s} {page:11d} {padding:9d}  {ranges(numbers)}")
    readers = [row["layer"] for row in found["layers"] if not row["page_bytes"]]
    if readers:
        out.append(f"  layers {ranges(readers)} read the cache of an earlier layer")
    out.append(
        f"  waste: {found['waste_bytes']} bytes in a sequence of {found['max_model_len']} tokens, {waste_percent(found):.2f} %"
    )
    if found["longest_sequence"] < found["max_model_len"]:
        needed = (found["blocks_per_sequence"] + 1) * found["bytes_per_block"]
        out.append(
            f"  a sequence of {found['max_model_len']} tokens does not fit: it needs {needed} bytes; the longest that fits has "
            f"{found['longest_sequence']} tokens (--max-model-len), or give the cache more memory (--gpu-memory-utilization)"
        )
    return out


def none_skipped(default: dict, none: dict) -> list[str]:
    """What a plan with vLLM's choice of native layers costs against one without any, if that is worth a line."""
    if not default["skipped"] or none["kv_tokens"] < WORTH_A_LINE * default["kv_tokens"]:
        return []
    return [
        f"  with --skip-layers none: {none['kv_tokens']} KV tokens, {none['num_groups']} group{'s' * (none['num_groups'] > 1)}, "
        f"waste {waste_percent(none):.2f} %"
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="a model's config.json or its folder")
    parser.add_argument("--memory", type=parse_memory, required=True, help="for one device's KV cache, e.g. 24GiB")
    parser.add_argument("--format", help="one format, auto or fp8; default: auto and every turboquant format")
    parser.add_argument("--tp", type=parse_positive, default=1, help="tensor parallel size")
    parser.add_argument("--max-model-len", type=parse_positive, help="tokens of one sequence; default: the model's")
    parser.add_argument("--block-size", type=int, default=16, help="tokens of the smallest page")
    parser.add_argument(
        "--skip-layers", type=parse_layers, help="layers that keep the native cache, or none; default: vLLM's choice"
    )
    parser.add_argument(
        "--in-flight-tokens",
        type=parse_positive,
        default=IN_FLIGHT_TOKENS,
        help="--max-num-batched-tokens times the batches under way at once (2 with asynchronous scheduling)",
    )
    parser.add_argument(
        "--blocks-per-state", type=parse_positive, default=1, help="2 where Mamba states are cached for prefixes"
    )
    parser.add_argument(
        "--side-by-side",
        action="store_true",
        help="the block is the outermost dimension of the cache (vLLM's layouts BLHNC and BLNHC)",
    )
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    try:
        config = read_config(args.config)
        names = (
            [args.format] if args.format else ["auto", *(f["name"] for f in native().formats() if not f["test_only"])]
        )

        def plan_with(name: str, skip: list[int] | None) -> dict:
            return plan(
                config,
                name,
                args.block_size,
                args.memory,
                tp=args.tp,
                max_model_len=args.max_model_len,
                skip=skip,
                in_flight_tokens=args.in_flight_tokens,
                blocks_per_state=args.blocks_per_state,
                side_by_side=args.side_by_side,
            )

        plans = {name: plan_with(name, args.skip_layers) for name in names}
    except ValueError as error:
        print(f"tq plan: {error}")
        return 2
    if args.json:
        print(json.dumps(plans, indent=1))
        return 0
    for name, found in plans.items():
        hint = none_skipped(found, plan_with(name, [])) if found["skipped"] else []
        print("\n".join(lines(name, found) + hint))
    return 0
