"""Other caches simulated in an engine with a native one: what is stored is rounded first, so attention reads what they would give.

fp8 is e4m3 with one scale per layer for keys and one for values: 1.0, as vLLM has it by default, or calibrated, the largest element of
what is measured on being the largest number. Simulated, because vLLM's CPU engine has fp8 caches on some instruction sets only and
cuts bits off where GPUs round to the nearest, which is four times the KL. Queries are not rounded, as some GPU kernels do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tq_backend.cli.peers import LARGEST_E4M3, PEERS
from tq_backend.cli.reads import attention_layers

FP8 = "fp8"
SIMULATED = (FP8, *PEERS)
Amax = dict[str, tuple[float, float]]  # a layer's largest |key| and |value|
Rounding = Callable[[str, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def rounded(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Saturated, as vLLM's kernels do it."""
    codes = (x.float() / scale).clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn)
    return (codes.float() * scale).to(x.dtype)


@contextmanager
def stored_through(engine: Any, change: Rounding) -> Iterator[None]:
    """change(layer name, key, value) in place of what each layer would store."""
    layers = attention_layers(engine)

    def through(name: str, own: Callable[..., None]) -> Callable[..., None]:
        return lambda layer, key, value, *rest, **more: own(layer, *change(name, key, value), *rest, **more)

    for name, layer in layers.items():
        layer.impl.do_kv_cache_update = through(name, layer.impl.do_kv_cache_update)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.impl.do_kv_cache_update  # the class's own again


@contextmanager
def noted_amax(engine: Any) -> Iterator[Amax]:
    """Yields what is filled in while the engine runs."""
    seen: Amax = {}

    def note(name: str, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = seen.get(name, (0.0, 0.0))
        seen[name] = (max(before[0], key.abs().max().item()), max(before[1], value.abs().max().item()))
        return key, value

    with stored_through(engine, note):
        yield seen


def unit_scale(name: str, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return rounded(key, 1.0), rounded(value, 1.0)


def calibrated(amax: Amax) -> Rounding:
    def change(name: str, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scales = [largest / LARGEST_E4M3 or 1.0 for largest in amax[name]]
        return rounded(key, scales[0]), rounded(value, scales[1])

    return change


def ways(name: str, amax: Amax) -> dict[str, Rounding]:
    """Under a note each, the ways to store a cache that is simulated; the better one counts."""
    if name == FP8:
        return {"simulated, scale 1.0": unit_scale, "simulated, calibrated scales": calibrated(amax)}
    of_key, of_value, _ = PEERS[name]
    return {"simulated": lambda _layer, key, value: (of_key(key), of_value(value))}


def bytes_per_token(engine: Any, name: str) -> int:
    of_vector = (lambda dim: dim) if name == FP8 else PEERS[name][2]
    return sum(
        layer.num_kv_heads * (of_vector(layer.head_size) + of_vector(layer.head_size_v))
        for layer in attention_layers(engine).values()
        if layer.kv_sharing_target_layer_name is None
    )
