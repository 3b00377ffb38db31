"""Layers that read another layer's cache (YOCO; Gemma 3n, Gemma 4), and what that means for the layers with a native cache.

A page has one format, so layers that share pages keep the native cache together or not at all. vLLM chooses native layers by
number alone and before it builds a layer, so the sharing is read from the model's configuration.
"""

from __future__ import annotations

from typing import Any

from tq_backend._library import native


def sharing_targets(text_config: Any) -> list[int]:
    """Of each layer the number of the one whose cache it reads, or -1 if it has its own.

    The last `num_kv_shared_layers` of them read the last layer of their kind (`layer_types`) that has its own.
    """
    number = text_config.num_hidden_layers
    first_shared = number - (getattr(text_config, "num_kv_shared_layers", 0) or 0)
    kinds = getattr(text_config, "layer_types", None) or ["full_attention"] * number
    last_of_kind = {kind: i for i, kind in enumerate(kinds[:first_shared])}
    return [-1 if i < first_shared else last_of_kind.get(kinds[i], -1) for i in range(number)]


def aligned_skip_layers(text_config: Any, skip_layers: list[str]) -> list[str]:
    """skip_layers with all layers that share a cache with a skipped one; entries as vLLM has them, numbers and kinds of layers.

    A kind ("sliding_window") skips whole sharing pairs by itself, because both layers of a pair are of one kind. Raises
    ValueError if a layer's number does not exist.
    """
    targets = sharing_targets(text_config)
    if max(targets, default=-1) < 0:
        return skip_layers
    kinds = [entry for entry in skip_layers if not entry.isdigit()]
    numbers = native().align_skip_layers(targets, [int(entry) for entry in skip_layers if entry.isdigit()])
    return [str(i) for i in numbers] + kinds
