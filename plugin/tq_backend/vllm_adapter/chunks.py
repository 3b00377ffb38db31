"""Pages for a model with layers that attend in chunks of tokens (Llama 4), where native and compressed layers meet.

The planner's block sizes are multiples of what the kernels need, which is not enough here. vLLM cuts a chunk out of a sequence's
table of blocks, so the blocks of such a layer divide the chunk; and it looks up prefixes in them only if every other layer's
blocks divide theirs. A native page of the same bytes holds fewer tokens, so a native layer that attends in chunks is counted as
one that keeps all tokens, which is what vLLM makes of all layers where it plans without kinds. There are few of them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from tq_backend.vllm_adapter.formats import slot_bytes
from tq_backend.vllm_adapter.specs import (
    Unplanned,
    attends_in_chunks,
    dtype_name,
    is_compressed,
    keeps_all_tokens,
    with_pages,
)

MAX_BLOCK = 1024  # prefixes are found in multiples of it


def bytes_of_sequence(specs: dict[str, Any], vllm_config: Any) -> int:
    return sum(spec.max_memory_usage_bytes(vllm_config) for spec in specs.values())


def with_page(specs: dict[str, Any], block: int, page: int, kernel: int) -> dict[str, Any] | None:
    """All layers in pages of so many bytes: chunks in blocks of so many tokens, the others in the largest that divide them. None if
    a layer does not fit."""
    divisors = [size for size in range(kernel, block + 1, kernel) if block % size == 0]
    found = {}
    for name, spec in specs.items():
        per_token = spec.num_heads * spec.state_content_size_bytes
        sizes = [size for size in ([block] if attends_in_chunks(spec) else divisors) if size * per_token <= page]
        if not sizes:
            return None
        try:
            found[name] = with_pages(name, spec, sizes[-1], page, page - sizes[-1] * per_token)
        except Unplanned:  # its kernels want other pages
            return None
    return found


def with_native_full(specs: dict[str, Any]) -> dict[str, Any]:
    """Native layers that attend in chunks keep all tokens."""
    return {
        name: keeps_all_tokens(spec) if attends_in_chunks(spec) and not is_compressed(spec) else spec
        for name, spec in specs.items()
    }


def planned(vllm_config: Any, specs: dict[str, Any], kernel: int) -> dict[str, Any]:
    """The specs, some of which attend in chunks, in pages of least memory. Raises Unplanned."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    if strange := [
        name for name, spec in specs.items() if not (attends_in_chunks(spec) or type(spec) is FullAttentionSpec)
    ]:
        raise Unplanned(f"{strange[0]} has a {type(specs[strange[0]]).__name__} beside layers that attend in chunks")
    chunk = math.gcd(*(spec.attention_chunk_size for spec in specs.values() if attends_in_chunks(spec)))
    tokens = [size for size in range(kernel, min(chunk, MAX_BLOCK) + 1, kernel) if chunk % size == 0]
    pages = {size * spec.num_heads * spec.state_content_size_bytes for spec in specs.values() for size in tokens}
    found = [each for block in tokens for page in sorted(pages) if (each := with_page(specs, block, page, kernel))]
    if not found:
        raise Unplanned(
            f"no equal pages suit all layers whose blocks are a multiple of {kernel} and divide chunks of {chunk} tokens"
        )
    return min(found, key=lambda each: bytes_of_sequence(each, vllm_config))


def bytes_of_groups(groups: list[Any], vllm_config: Any) -> int:
    """Of a sequence, with what the engine's groups add: each has as many pages in a block as the largest has layers."""
    layers = max(len(group.layer_names) for group in groups)
    return sum(layers * group.kv_cache_spec.max_memory_usage_bytes(vllm_config) for group in groups)


def all_compressed(specs: dict[str, Any]) -> dict[str, Any]:
    """All pages are then equal, and no layer keeps more tokens than it attends to."""
    mode = next(spec.kv_quant_mode for spec in specs.values() if is_compressed(spec))
    name = mode.name.lower()
    return {
        layer: replace(spec, kv_quant_mode=mode, state_content_bytes=slot_bytes(name, spec.head_size, spec.head_size_v))
        for layer, spec in specs.items()
    }


def sentence(planned: dict[str, Any], vllm_config: Any) -> str:
    """The plan and its waste, in one line."""
    pages: dict[str, int] = {}
    waste = 0
    for spec in planned.values():
        kind = spec.kv_quant_mode.name.lower() if is_compressed(spec) else dtype_name(spec.dtype)
        reach = f"chunks of {spec.attention_chunk_size}" if attends_in_chunks(spec) else "all tokens"
        padding = spec.page_size_bytes - spec.unpadded_page_size_bytes
        key = f"{kind}, {reach}: {spec.block_size} tokens, {spec.page_size_bytes} bytes" + (
            f" with {padding} of padding" if padding else ""
        )
        pages[key] = pages.get(key, 0) + 1
        waste += padding * (spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes)
    needed = bytes_of_sequence(planned, vllm_config)
    return (
        "blocks that divide chunks; "
        + "; ".join(f"{count} x ({key})" for key, count in pages.items())
        + f"; a sequence of {vllm_config.model_config.max_model_len} tokens takes {needed} bytes, waste {waste} bytes, "
        f"{100 * waste / needed:.2f} %"
    )
