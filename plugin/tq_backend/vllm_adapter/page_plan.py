"""The pages of an engine with a compressed cache: block sizes and paddings of the planner, in place of vLLM's.

vLLM gives all layers one block size and pads the pages that then differ up to the largest one, a compressed page up to a native
one. Here the planner chooses: a uniform spec where that is possible, else block sizes with a bounded common multiple, and only
then padding. It works on the specs that the engine collected from its layers, just before it groups them; how it groups them, and
how many blocks a sequence needs, stays vLLM's.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tq_backend._library import native
from tq_backend.model_layers import CacheLayer
from tq_backend.plan_text import STRATEGIES, describe, waste_percent
from tq_backend.vllm_adapter import accuracy, chunks, coverage, formats
from tq_backend.vllm_adapter.specs import (
    Unplanned,
    attends_in_chunks,
    dtype_name,
    is_compressed,
    is_state,
    with_native_cache,
    with_pages,
)

logger = logging.getLogger("vllm.tq_backend")

# What the engine's planning raises where it finds no grouping.
ENGINE_ERRORS = (NotImplementedError, ValueError, AssertionError, StopIteration)
# What our reading of its specs raises in an engine that changed under us.
ENGINE_CHANGED = (AttributeError, TypeError, ImportError)
# Tokens of which a native layer's blocks are a multiple; the stock CPU attention is coarser than the others.
KERNEL_BLOCK, CPU_KERNEL_BLOCK = 16, 32
ALL_COMPRESSED = """--additional-config '{"turboquant": {"skip_layers": []}}'"""
WORTH_A_HINT = 0.02  # of a sequence's bytes


@dataclass(frozen=True)
class Request:
    """native().plan_pages' arguments beside the memory."""

    layers: list[dict[str, Any]]
    block_size: int
    max_model_len: int
    in_flight_tokens: int
    blocks_per_state: int

    def plan(self) -> dict[str, Any]:
        return native().plan_pages(
            self.layers,
            self.block_size,
            0,
            max_model_len=self.max_model_len,
            max_in_flight_tokens=self.in_flight_tokens,
            blocks_per_state=self.blocks_per_state,
        ) | {"max_model_len": self.max_model_len}


def planner_layer(name: str, spec: Any, windows_are_full: bool) -> dict[str, Any]:
    """One layer as the planner takes it. Raises Unplanned for a kind of cache that it does not know."""
    from vllm.utils.torch_utils import get_dtype_size
    from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, SlidingWindowSpec

    if is_state(spec):
        return {"state_bytes": spec.state_content_size_bytes}
    # Windows and chunks are full where vLLM keeps all tokens of all layers; chunks are freed by a rule that the planner lacks.
    known = (FullAttentionSpec, SlidingWindowSpec, *[ChunkedLocalAttentionSpec] * windows_are_full)
    if type(spec) not in known or spec.tokens_per_state != 1:
        raise Unplanned(f"{name} has a {type(spec).__name__}")
    window = 0 if windows_are_full else (spec.sliding_window or 0)
    layer = {
        "num_kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_size,
        "head_dim_v": spec.head_size_v,
        "sliding_window": window + getattr(spec, "extra_retained_tokens", 0) if window else 0,
    }
    if is_compressed(spec):
        return layer | {"format": formats.page_format(spec.kv_quant_mode.name.lower())}
    element = get_dtype_size(spec.dtype)
    content = spec.state_content_size_bytes
    if spec.num_heads == spec.num_kv_heads and content == (spec.head_size + spec.head_size_v) * element:
        return layer | {"native_bytes": element}
    # Scales beside the elements, or other packings: so many bytes, whatever they are.
    return layer | {
        "num_kv_heads": spec.num_heads, "native_bytes": 1, "head_dim": content // 2, "head_dim_v": content - content // 2
    }  # fmt: skip


def kernel_block(specs: dict[str, Any]) -> int:
    """Tokens of which every layer's block must be a multiple."""
    from vllm.platforms import current_platform

    attention = [spec for spec in specs.values() if not is_state(spec)]
    sizes = [KERNEL_BLOCK]
    if current_platform.is_cpu() and not all(map(is_compressed, attention)):
        sizes.append(CPU_KERNEL_BLOCK)
    # A backend with fixed sizes names the largest one here; the engine splits larger blocks into such.
    sizes += [base for spec in attention if (base := getattr(spec.block_stride_alignment, "base", 0))]
    return math.lcm(*sizes)


def smallest_block(vllm_config: Any, specs: dict[str, Any], windows_are_full: bool) -> int:
    """Tokens of the smallest page: the engine's block size where that costs nothing, or the user gave it."""
    cache, kernel = vllm_config.cache_config, kernel_block(specs)
    attention = [spec for spec in specs.values() if not is_state(spec)]
    states = [spec for spec in specs.values() if is_state(spec)]
    if states and cache.mamba_cache_mode != "none":
        # States are cached at multiples of their block size, which the workers know already, and the scheduler takes the
        # smallest block of all for it: no other layer may have a smaller one.
        sizes = {spec.block_size for spec in states}
        if cache.mamba_cache_mode != "align" or len(sizes) > 1:
            raise Unplanned(
                f"Mamba states are cached in mode {cache.mamba_cache_mode!r} with block sizes {sorted(sizes)}"
            )
        return math.lcm(kernel, *sizes)
    one_kind = not states and (
        windows_are_full or len({getattr(spec, "sliding_window", None) for spec in attention}) == 1
    )
    sizes = {spec.block_size for spec in attention}
    one_size = len(sizes) == 1 and all(spec.page_size_padded is None for spec in attention)
    if one_size and (one_kind or (not states and len({spec.page_size_bytes for spec in attention}) == 1)):
        return sizes.pop()
    if not states and (one_kind or cache.user_specified_block_size):
        return math.lcm(kernel, cache.block_size)
    return kernel


def request_of(vllm_config: Any, specs: dict[str, Any]) -> Request:
    windows_are_full = bool(vllm_config.scheduler_config.disable_hybrid_kv_cache_manager)
    layers = [planner_layer(name, spec, windows_are_full) for name, spec in specs.items()]
    per_state = {
        -(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes)
        for spec in specs.values()
        if is_state(spec)
    }
    if len(per_state) > 1:
        raise Unplanned(f"Mamba states need {sorted(per_state)} blocks in a sequence")
    return Request(
        layers,
        smallest_block(vllm_config, specs, windows_are_full),
        vllm_config.model_config.max_model_len,
        vllm_config.max_in_flight_tokens,
        max(per_state, default=1),
    )


def planned_specs(specs: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The engine's specs with the plan's block sizes and paddings."""
    return {
        name: with_pages(name, spec, row["block_size"], row["page_bytes"], row["padding_bytes"])
        for (name, spec), row in zip(specs.items(), found["layers"], strict=True)
    }


def bytes_of_sequence(found: dict[str, Any]) -> int:
    return found["blocks_per_sequence"] * found["bytes_per_block"]


def hint(request: Request, specs: dict[str, Any], kernel: int, found: dict[str, Any]) -> str:
    """The one flag that would save most, if one saves enough to say so."""
    format_name = next(layer["format"] for layer in request.layers if layer.get("format"))
    compressed = [
        layer if layer.get("state_bytes") else layer | {"format": format_name, "head_dim": spec.head_size, "head_dim_v": spec.head_size_v}
        for layer, spec in zip(request.layers, specs.values(), strict=True)
    ]  # fmt: skip
    others = {ALL_COMPRESSED: replace(request, layers=compressed)}
    if request.block_size > kernel:
        if request.blocks_per_state > 1:
            others["--no-enable-prefix-caching"] = replace(request, block_size=kernel, blocks_per_state=1)
        else:
            others[f"--block-size {kernel}"] = replace(request, block_size=kernel)
    saved = {}
    for flag, other in others.items():
        try:
            saved[flag] = 1 - bytes_of_sequence(other.plan()) / bytes_of_sequence(found)
        except ValueError:  # a head that no compressed page takes
            continue
    best = max(saved, key=lambda flag: saved[flag], default="")
    return f"; {best} would save {100 * saved[best]:.1f} %" if best and saved[best] >= WORTH_A_HINT else ""


def native_request(request: Request, dtype: Any) -> Request:
    """The same layers, all with the native cache."""
    from vllm.utils.torch_utils import get_dtype_size

    plain = {"format": None, "native_bytes": get_dtype_size(dtype)}
    return replace(request, layers=[x | plain if x.get("format") else x for x in request.layers])


def sentence(request: Request, specs: dict[str, Any], found: dict[str, Any]) -> str:
    """The plan and its waste, in one line."""
    pages: dict[str, int] = {}
    for i, (layer, spec, row) in enumerate(zip(request.layers, specs.values(), found["layers"], strict=True)):
        shape = CacheLayer(
            i, layer.get("num_kv_heads", 0), layer.get("head_dim", 0), getattr(spec, "sliding_window", None) or 0,
            state_bytes=layer.get("state_bytes", 0),
        )  # fmt: skip
        kind = describe(shape, layer.get("format") or str(getattr(spec, "dtype", "")).removeprefix("torch."))
        tokens = "" if shape.state_bytes else f"{row['block_size']} tokens, "
        padding = f" with {row['padding_bytes']} of padding" if row["padding_bytes"] else ""
        key = f"{kind}: {tokens}{row['page_bytes']} bytes{padding}"
        pages[key] = pages.get(key, 0) + 1
    return (
        f"{STRATEGIES[found['strategy']]}, {found['num_groups']} group{'s' * (found['num_groups'] > 1)}; "
        + "; ".join(f"{count} x ({key})" for key, count in pages.items())
        + f"; a sequence of {request.max_model_len} tokens takes {bytes_of_sequence(found)} bytes, waste "
        f"{found['waste_bytes']} bytes, {waste_percent(found):.2f} %"
    )


@functools.cache
def say(level: int, line: str) -> None:
    """Once per process and line: workers group layers too while they profile."""
    logger.log(level, "tq-backend %s", line)


def check_backends(specs: dict[str, Any]) -> None:
    """Raises NotImplementedError for compressed layers whose pages are not ours: a few models choose a backend for a layer
    themselves (MiMo V2, OpenPangu, where values are narrower than keys), and it would run over the packed bytes."""
    foreign = [
        name
        for name, spec in specs.items()
        if is_compressed(spec)
        and spec.state_content_bytes
        != formats.slot_bytes(spec.kv_quant_mode.name.lower(), spec.head_size, spec.head_size_v)
    ]
    if foreign:
        raise NotImplementedError(
            f"tq-backend: this model's code chooses another attention backend for {', '.join(foreign)}, which cannot read a "
            "compressed cache; use --kv-cache-dtype auto or fp8 for it"
        )


def grouped(own: Callable[..., list[Any]], vllm_config: Any, specs: dict[str, Any]) -> list[Any]:
    """The engine's get_kv_cache_groups on the planner's pages. Raises ValueError if neither the planner nor the engine finds pages
    for these layers, and with `strict` if layers are native that should not be."""
    check_backends(specs)
    if not any(map(is_compressed, specs.values())):
        say(*coverage.line(vllm_config, specs, ""))
        return own(vllm_config, specs)
    groups, saved = _grouped(own, vllm_config, specs)
    say(*coverage.line(vllm_config, specs, saved))
    if known := accuracy.line(vllm_config, specs):
        say(logging.WARNING, known)
    return groups


@dataclass(frozen=True)
class Pages:
    specs: dict[str, Any]
    line: str  # the plan and its waste
    native_bytes: int  # of a sequence whose layers are all native
    num_bytes: int = 0  # of a sequence; 0 if only the engine's groups tell
    num_groups: int = 0  # as above


def planner_pages(vllm_config: Any, specs: dict[str, Any]) -> Pages:
    request = request_of(vllm_config, specs)
    found = request.plan()
    line = sentence(request, specs, found) + hint(request, specs, kernel_block(specs), found)
    plain = bytes_of_sequence(native_request(request, vllm_config.model_config.dtype).plan())
    return Pages(planned_specs(specs, found), line, plain, bytes_of_sequence(found), found["num_groups"])


def chunk_pages(vllm_config: Any, specs: dict[str, Any]) -> Pages:
    planned = specs  # vLLM's own block size, if there is nothing to pad
    if len({spec.page_size_bytes for spec in specs.values()}) > 1:
        fuller = chunks.with_native_full(specs)
        if not any(map(attends_in_chunks, fuller.values())):
            return planner_pages(vllm_config, fuller)
        planned = chunks.planned(vllm_config, fuller, kernel_block(fuller))
    needed = chunks.bytes_of_sequence(planned, vllm_config)
    saved = 1 - chunks.bytes_of_sequence(chunks.all_compressed(specs), vllm_config) / needed
    worth = f"; {ALL_COMPRESSED} would save {100 * saved:.1f} %" if saved >= WORTH_A_HINT else ""
    dtype = vllm_config.model_config.dtype
    plain = chunks.bytes_of_sequence(
        {name: with_native_cache(spec, dtype) for name, spec in specs.items()}, vllm_config
    )
    return Pages(planned, chunks.sentence(planned, vllm_config) + worth, plain)


def _grouped(own: Callable[..., list[Any]], vllm_config: Any, specs: dict[str, Any]) -> tuple[list[Any], str]:
    """The groups, and what they save."""
    in_chunks = any(map(attends_in_chunks, specs.values()))
    try:
        all_full = vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
        pages = (chunk_pages if in_chunks and not all_full else planner_pages)(vllm_config, specs)
        groups = own(vllm_config, pages.specs)
    except (Unplanned, *ENGINE_ERRORS) as error:
        reason = str(error) or type(error).__name__
    except ENGINE_CHANGED as error:  # it keeps its own planning
        reason = f"{type(error).__name__}: {error}"
    else:
        say(logging.INFO, f"plans pages: {pages.line}")
        if pages.num_groups and len(groups) != pages.num_groups:
            say(logging.WARNING, f"planned {pages.num_groups} groups of layers, and this vLLM makes {len(groups)}")
        times = pages.native_bytes / (pages.num_bytes or chunks.bytes_of_groups(groups, vllm_config))
        return groups, f"{times:.1f}x less memory than {dtype_name(vllm_config.model_config.dtype)}"
    try:
        groups = own(vllm_config, specs)
    except ENGINE_ERRORS as error:
        raise ValueError(
            f"tq-backend: there are no pages for these layers: {reason}; and vLLM's own planning says: "
            f"{str(error) or type(error).__name__}; keep all layers native with --kv-cache-dtype auto, or compress all with "
            f"{ALL_COMPRESSED}"
        ) from error
    say(logging.WARNING, f"leaves the page sizes to vLLM: {reason}")
    try:
        return groups, coverage.saving_per_token(specs, vllm_config.model_config.dtype)
    except ENGINE_CHANGED:
        return groups, ""
