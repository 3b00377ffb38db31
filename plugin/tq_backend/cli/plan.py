"""`tq plan`: how many tokens fit in a given memory, per format, and in pages of which sizes. Needs no GPU and no engine."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from tq_backend import key_bias, model_layers
from tq_backend._library import native
from tq_backend.cli.arguments import parse_positive
from tq_backend.cli.read_config import config_file, read_config
from tq_backend.model_text import DTYPE_BYTES, FilledIn, language_part, shown, text_config
from tq_backend.names import is_ours
from tq_backend.plan_text import describe, lines, waste_percent

# A letter alone is what GPU memory is sold in: 24G is 24GiB.
UNITS = {"": 1, "B": 1}
for exponent, letter in enumerate("KMGT", start=1):
    UNITS |= {letter: 1 << 10 * exponent, f"{letter}IB": 1 << 10 * exponent, f"{letter}B": 10 ** (3 * exponent)}
LEAST_MEMORY, MOST_MEMORY = 1 << 20, 1 << 50
NATIVE_FORMATS = ("auto", "fp8")
# Twice vLLM's default --max-num-batched-tokens of a server on a large GPU: with asynchronous scheduling two batches are under
# way, and a window's pages are freed behind them.
IN_FLIGHT_TOKENS = 2 * 8192
WORTH_A_LINE = 1.02  # times as many tokens


def parse_memory(text: str) -> int:
    match = re.fullmatch(r"\s*(\d*\.?\d+)\s*([A-Za-z]*)\s*", text, re.ASCII)
    if match is None or len(text) > 40 or match[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not a memory size; write for example 24GiB (units: KiB, MiB, GiB, TiB, powers of 1024, also K, M, G, T; "
            "KB, MB, GB, TB, powers of 1000; in any case)"
        )
    size = int(Decimal(match[1]) * UNITS[match[2].upper()])
    if not LEAST_MEMORY <= size <= MOST_MEMORY:
        raise argparse.ArgumentTypeError(
            f"{text!r} is {size} bytes; it must be from 1MiB to 1024TiB"
            + ("; is its unit missing?" if not match[2] else "")
        )
    return size


def parse_layers(text: str) -> list[int]:
    if text == "none":
        return []
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text, re.ASCII):
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not a list of layers; write for example 0,1,30,31, or none for none"
        )
    return [int(number) for number in text.split(",")]


def with_dtype(config: Mapping[str, Any], dtype: str) -> Mapping[str, Any]:
    """The config as an engine with this --dtype serves it."""
    text = language_part(config)
    if dtype == "auto":
        dtype = "bfloat16" if text["dtype"] == "float32" else text["dtype"]
    text["dtype"] = dtype
    return FilledIn(text) if isinstance(config, FilledIn) else text


def plan(
    config: Mapping[str, Any],
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
    text = text_config(config)
    layers = model_layers.cache_layers(config, tp)
    skipped = model_layers.skip_layers(config, format_name, skip) if format_name not in NATIVE_FORMATS else []
    element = 1 if format_name == "fp8" else DTYPE_BYTES[text["dtype"]]
    # A skipped layer keeps the model's dtype. fp8 and auto have no skipped layers.
    given = model_layers.plan_layers(layers, None if format_name in NATIVE_FORMATS else format_name, element, skipped)
    length = max_model_len or text["max_position_embeddings"]
    if length is None:
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


def none_skipped(default: dict, none: dict) -> list[str]:
    """What a plan with vLLM's choice of native layers costs against one without any, if that is worth a line."""
    if not default["skipped"] or none["kv_tokens"] < WORTH_A_LINE * default["kv_tokens"]:
        return []
    return [
        f"  with --skip-layers none: {none['kv_tokens']} KV tokens, {none['num_groups']} group{'s' * (none['num_groups'] > 1)}, "
        f"waste {waste_percent(none):.2f} %"
    ]


def key_biases(config_name: str, config: Mapping[str, Any], max_model_len: int | None) -> list[key_bias.KeyBias]:
    """None where the weights are not beside the configuration."""
    try:
        return key_bias.read(config_file(config_name).parent, key_bias.heads_of(text_config(config), max_model_len))
    except ValueError:
        return []


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        help="a model's config.json, its folder, or its Hugging Face name if it is in the local cache",
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", *DTYPE_BYTES],
        default="auto",
        help="of the native cache, as the engine's --dtype; auto: the model's, and bfloat16 for float32, as vLLM has it",
    )
    parser.add_argument("--memory", type=parse_memory, required=True, help="for one device's KV cache, e.g. 24GiB")
    parser.add_argument("--format", help="one format, auto or fp8; default: auto and every format of ours")
    parser.add_argument("--tp", type=parse_positive, default=1, help="tensor parallel size")
    parser.add_argument("--max-model-len", type=parse_positive, help="tokens of one sequence; default: the model's")
    parser.add_argument("--block-size", type=parse_positive, default=16, help="tokens of the smallest page")
    parser.add_argument(
        "--skip-layers",
        type=parse_layers,
        help="layers that keep the native cache, or none; default: of a preset vLLM's choice, "
        "of other formats those whose key bias they do not hold",
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
        config = with_dtype(read_config(args.config), args.dtype)
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

        biases = key_biases(args.config, config, args.max_model_len)
        chosen = {name: args.skip_layers for name in names}
        if args.skip_layers is None:
            chosen = {name: key_bias.native_by_default(name, biases) for name in names}
        plans = {name: plan_with(name, skip) for name, skip in chosen.items()}
    except ValueError as error:
        print(f"tq plan: {error}")
        return 2
    if args.json:
        print(json.dumps(plans, indent=1))
        return 0
    for name, found in plans.items():
        hint = none_skipped(found, plan_with(name, [])) if found["skipped"] and is_ours(name) else []
        if words := key_bias.sentence(name, biases, found["skipped"]):
            hint += [f"  {words}"]
        print("\n".join(lines(name, found) + hint))
    return 0
