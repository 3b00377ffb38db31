"""The engine's specs, one of each layer with a cache: what kind a layer is of, and the same layer with other pages."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any


class Unplanned(Exception):
    """No pages of ours for a layer of this engine; the sentence says for which and why."""


def is_compressed(spec: Any) -> bool:
    mode = getattr(spec, "kv_quant_mode", None)
    return mode is not None and mode.is_turboquant


def _kind(name: str) -> Any:
    """A class of vLLM's; in one that lacks it no layer is of that kind."""
    from vllm.v1 import kv_cache_interface

    return getattr(kv_cache_interface, name, ())


def is_state(spec: Any) -> bool:
    return type(spec) is _kind("MambaSpec")


def attends_in_chunks(spec: Any) -> bool:
    """And frees the pages of a chunk that is done."""
    return isinstance(spec, _kind("ChunkedLocalAttentionSpec"))


def keeps_all_tokens(spec: Any) -> Any:
    """A layer that attends in chunks and frees no page: vLLM's own words for it, where it treats all layers as full attention."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    shared = {field.name for field in fields(spec)} & {field.name for field in fields(FullAttentionSpec)}
    return FullAttentionSpec(**{name: getattr(spec, name) for name in shared})


def with_native_cache(spec: Any, dtype: Any) -> Any:
    """The layer with the cache that vLLM would give it."""
    return replace(spec, dtype=dtype, kv_quant_mode=type(spec.kv_quant_mode).NONE, state_content_bytes=None)


def dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def with_pages(name: str, spec: Any, block_size: int, page_bytes: int, padding: int) -> Any:
    """The layer with blocks of so many tokens in pages of so many bytes. Raises Unplanned if its kernels cannot read them."""
    changes: dict[str, Any] = {"page_size_padded": page_bytes if padding else None}
    if not is_state(spec):
        changes["block_size"] = block_size
        split = getattr(spec.block_stride_alignment, "base", block_size)
        if padding and split != block_size:
            raise Unplanned(f"{name} runs in blocks of {split} tokens, and a padded page cannot be split into them")
        if isinstance(spec.block_stride_alignment, int) and page_bytes % spec.block_stride_alignment:
            raise Unplanned(f"{name} needs pages that are a multiple of {spec.block_stride_alignment} bytes")
    changed = replace(spec, **changes)
    if changed.page_size_bytes != page_bytes:
        raise Unplanned(f"a page of {name} has {changed.page_size_bytes} bytes and not {page_bytes}")
    return changed
