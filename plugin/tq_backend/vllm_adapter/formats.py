"""vLLM's kv_cache_dtype names and the page formats they stand for.

A preset carries vLLM's own name. Any other format is chosen beside such a name, by additional_config['turboquant']['format'], since
vLLM takes no cache dtype that it does not know. vLLM asks a class, and not an engine, how large a layer's pages are, so the choice is
kept here: use() sets it wherever an engine that asks for us shows its configuration, before that engine's first layer is made. Engines
that live in one process must be made one after the other, as vLLM's own global configuration wants it too; one that were made with
another's choice would fail the checks of its pages' bytes.
"""

from __future__ import annotations

from typing import Any

from tq_backend._library import native
from tq_backend.names import is_ours
from tq_backend.vllm_adapter.options import read_options

CACHE_DTYPES = [f["name"] for f in native().formats() if is_ours(f["name"])]

_chosen: str | None = None


def use(vllm_config: Any) -> None:
    """From here on, of the engine with this configuration. Raises ValueError for options that are wrong."""
    global _chosen  # noqa: PLW0603
    _chosen = read_options(getattr(vllm_config, "additional_config", None)).format


def page_format(kv_cache_dtype: str) -> str:
    """The format of the pages that a layer of this dtype gets."""
    return _chosen or kv_cache_dtype


def slot_bytes(kv_cache_dtype: str, head_dim: int, head_dim_v: int) -> int:
    """Bytes of one token and one KV head."""
    return native().kv_cache_spec(page_format(kv_cache_dtype), 1, head_dim, head_dim_v)["slot_bytes"]


def serves_head_dim(head_dim: int) -> bool:
    """The library's own rule; all formats have the same."""
    try:
        slot_bytes(CACHE_DTYPES[0], head_dim, head_dim)
    except (TypeError, ValueError):  # a TypeError is of a number beyond 32 bits
        return False
    return True


def rotates_keys(kv_cache_dtype: str) -> bool:
    """FP8 and float keys are quantized as they are, all others rotated."""
    return native().format_by_name(page_format(kv_cache_dtype))["rotates_keys"]


def subtracts_key_offset(kv_cache_dtype: str) -> bool:
    """Whether a layer takes a static vector from its keys before it stores them: our own formats do, vLLM's presets do not."""
    return page_format(kv_cache_dtype).startswith("tq_")


def format_id(kv_cache_dtype: str) -> int:
    return native().format_by_name(page_format(kv_cache_dtype))["format_id"]
