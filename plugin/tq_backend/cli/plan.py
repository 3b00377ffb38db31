"""`tq plan`: how many tokens fit in a given memory, per format. Needs no GPU and no engine."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from tq_backend._library import native

UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
NATIVE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def parse_memory(text: str) -> int:
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2] not in UNITS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a memory size; write for example 24GiB (units: {', '.join(UNITS)[2:]})"
        )
    return int(float(match[1]) * UNITS[match[2]])


def read_config(path: Path) -> dict:
    """A Hugging Face config.json, or the folder that holds one. Raises ValueError with a sentence."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--config {path} cannot be read as a config.json: {error}") from error
    config = config.get("text_config", config)
    for key in ("num_hidden_layers", "num_attention_heads"):
        if not isinstance(config.get(key), int):
            raise ValueError(f"{file} has no {key}; it must be the config.json of a decoder model")
    if config.get("kv_lora_rank") is not None:
        raise ValueError(
            f"{file} describes MLA attention, whose cache is not keys and values; these formats do not serve it"
        )
    if len(set(config.get("layer_types") or ["full_attention"])) > 1:
        raise ValueError(f"{file} mixes layer types; this version plans models whose layers are all alike")
    return config


def plan(config: dict, format_name: str, block_size: int, memory: int) -> dict:
    """Page and token counts when every layer has this format; "auto" is the native cache of the config's dtype."""
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    layers = config["num_hidden_layers"]
    if format_name == "auto":
        element = NATIVE_BYTES.get(str(config.get("torch_dtype") or config.get("dtype") or "bfloat16"), 2)
        page = 2 * heads * head_dim * element * block_size
        blocks = memory // (page * layers)
        return {"page_bytes": page, "num_blocks": blocks, "kv_tokens": blocks * block_size}
    layer = {"format": format_name, "num_kv_heads": heads, "head_dim": head_dim}
    found = native().plan_pages([layer] * layers, block_size, memory)
    return {
        "page_bytes": found["layers"][0]["page_bytes"],
        "num_blocks": found["num_blocks"],
        "kv_tokens": found["kv_tokens"],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="a model's config.json or its folder")
    parser.add_argument("--memory", type=parse_memory, required=True, help="for the KV cache, for example 24GiB")
    parser.add_argument("--format", help="one format; default: all of them beside the native cache")
    parser.add_argument("--block-size", type=int, default=16, help="tokens per page")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    try:
        config = read_config(args.config)
        names = (
            [args.format] if args.format else ["auto", *(f["name"] for f in native().formats() if not f["test_only"])]
        )
        plans = {name: plan(config, name, args.block_size, args.memory) for name in names}
    except ValueError as error:
        print(f"tq plan: {error}")
        return 2
    if args.json:
        print(json.dumps(plans, indent=1))
        return 0
    print(f"{config['num_hidden_layers']} layers, {args.memory} bytes, pages of {args.block_size} tokens")
    print(f"{'format':22s} {'page bytes':>11s} {'KV tokens':>12s}")
    for name, row in plans.items():
        print(f"{name:22s} {row['page_bytes']:11d} {row['kv_tokens']:12d}")
    return 0
