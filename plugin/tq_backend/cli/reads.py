"""What the kernels of an engine have to read, layer by layer, from the layers that the engine really built."""

from __future__ import annotations

from typing import Any


def attended(length: int, window: int, chunk: int) -> int:
    """Tokens that the queries of a sequence attend to, their own included, all together. A window of w is a query and the w - 1
    tokens before it; with chunks of c a query sees its own chunk. 0: neither."""
    if chunk:
        whole, rest = divmod(length, chunk)
        return whole * attended(chunk, window, 0) + attended(rest, window, 0)
    inside = min(length, window) if window else length
    return inside * (inside + 1) // 2 + (length - inside) * inside


def attention_layers(engine: Any) -> dict[str, Any]:
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    return get_layers_from_vllm_config(engine.llm.llm_engine.vllm_config, Attention)


def needed_reads(engine: Any, lengths: list[int]) -> int:
    """By the compressed layers, if every attended token comes from a page. How a prompt is cut for prefill changes nothing."""
    from tq_backend.vllm_adapter.impl import TurboQuantImpl

    return sum(
        attended(length, layer.impl.sliding_window, getattr(layer, "attention_chunk_size", 0) or 0)
        for layer in attention_layers(engine).values()
        if isinstance(layer.impl, TurboQuantImpl)
        for length in lengths
    )


def check_all_compressed(engine: Any, before: dict[str, int], after: dict[str, int], lengths: list[int]) -> None:
    """Raises RuntimeError unless the library counted as many reads as attention over sequences of these lengths needs."""
    want = needed_reads(engine, lengths)
    got = after["compressed_kv_reads"] - before["compressed_kv_reads"]
    if got != want:
        raise RuntimeError(
            f"the kernels read {got} compressed tokens where attention needed {want}: another kernel ran, or a layer attends to "
            "other tokens than its window says"
        )
    if want == 0:
        raise RuntimeError("no layer of this model is compressed, so there is nothing to measure")


def bytes_per_token(engine: Any) -> int:
    """Of all layers that keep a cache of their own, without what pages add. vLLM's own spec of a compressed layer does not know the
    size of its codes; the layer does."""
    from tq_backend.vllm_adapter.impl import TurboQuantImpl

    def of_layer(layer: Any) -> int:
        if isinstance(layer.impl, TurboQuantImpl):
            return layer.impl.page_bytes // layer.impl.block_size
        return layer.num_kv_heads * (layer.head_size + layer.head_size_v) * layer.kv_cache_torch_dtype.itemsize

    return sum(
        of_layer(layer) for layer in attention_layers(engine).values() if layer.kv_sharing_target_layer_name is None
    )
