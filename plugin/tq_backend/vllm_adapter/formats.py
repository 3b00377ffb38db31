"""vLLM's kv_cache_dtype names and the page formats they stand for."""

from __future__ import annotations

from tq_backend._library import native

CACHE_DTYPES = [f["name"] for f in native().formats() if not f["test_only"]]


def page_format(kv_cache_dtype: str) -> str:
    """The format of the pages that a layer of this dtype gets: presets carry vLLM's own names."""
    return kv_cache_dtype


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
    """Lloyd-Max keys are rotated before they are quantized, FP8 and float keys are not."""
    return native().format_by_name(page_format(kv_cache_dtype))["key_bits"] < 8


def format_id(kv_cache_dtype: str) -> int:
    return native().format_by_name(page_format(kv_cache_dtype))["format_id"]
