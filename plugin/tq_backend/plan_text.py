"""A page plan in words: what `tq plan` prints and what an engine's adapter logs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from tq_backend.model_layers import CacheLayer

STRATEGIES = {
    "uniform": "one group, pages of their own sizes",
    "side_by_side": "pages of their own sizes side by side in a block",
    "equal_pages": "block sizes that make all pages equal",
    "padded_pages": "block sizes that make all pages nearly equal",
}


def describe(layer: CacheLayer, cache: str) -> str:
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


def waste_percent(found: dict[str, Any]) -> float:
    return 100 * found["waste_bytes"] / (found["blocks_per_sequence"] * found["bytes_per_block"])


def lines(name: str, found: dict[str, Any]) -> list[str]:
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
