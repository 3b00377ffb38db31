"""Static key offsets: of each layer the vector that its keys have in common, from the weights of a loaded model.

A bias b of the key projection is R(j) b in the key of token j, R(j) being the rotary embedding. c, its mean (static_offset.py says which), may
be taken from all keys of a head: q.c is one number for all tokens that a query sees, so the softmax stays as it is, whatever c is. What c
leaves is what the quantizer sees. Both b and R(j) are asked of the engine's own modules, so
tensor parallelism, quantized weights, scaled, partial and interleaved rotary embeddings are as they are in its forward pass.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
from collections.abc import Callable
from typing import Any

import torch

from tq_backend.names import LOGGER
from tq_backend.static_offset import MOST_POSITIONS, context_lengths
from tq_backend.vllm_adapter import formats
from tq_backend.vllm_adapter.coverage import named

logger = logging.getLogger(LOGGER)

STEP = 4096  # positions at a time: 16 MB of 8 heads of 128
# Keys without a large bias have a norm of 4 to 20, and tokens differ by 3 to 6 of it (Qwen2.5): a c below is not worth its subtraction.
LEAST_NORM = 10.0
# Of |b|. From a quarter on c takes 3 % off the norm and more; a bias that turns fast has less of a mean.
LEAST_SHARE = 0.25
# How the layers that are known name a QKVParallelLinear whose outputs are all queries, all keys, all values.
PROJECTIONS = ("qkv_proj", "query_key_value", "c_attn")


class NoOffset(Exception):
    """Why a layer with a key bias, or with a projection that cannot be asked, gets none."""


def is_invariant(impl: Any) -> bool:
    """Whether the same number on all scores of a query leaves a layer's result as it is."""
    return getattr(impl, "sinks", None) is None and not getattr(impl, "logits_soft_cap", None)


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """Without LoRA's layer around it, which is there when weights are loaded again."""
    return getattr(module, "base_layer", module)


def children(modules: dict[str, torch.nn.Module], name: str) -> dict[str, torch.nn.Module]:
    return {key: unwrapped(child) for key, child in modules[name].named_children()}


def is_rotary(module: torch.nn.Module) -> bool:
    """By its name: some models have a class of their own."""
    return any(word in type(module).__name__.lower() for word in ("rotary", "rope"))


def key_bias(projection: torch.nn.Module, num_kv_heads: int, head_dim: int) -> torch.Tensor:
    """[num_kv_heads, head_dim] of this rank: what the projection makes of nothing. (A quantization may have permuted the parameter.)"""
    nothing = torch.zeros(1, projection.input_size, dtype=projection.params_dtype, device=projection.bias.device)
    made = projection(nothing)
    output, beside = made if isinstance(made, tuple) else (made, None)
    row = (output if beside is None else output + beside)[0].float()
    first = projection.num_heads * projection.head_size
    if (projection.num_kv_heads, projection.head_size) != (num_kv_heads, head_dim):
        raise NoOffset(f"its projection has {projection.num_kv_heads} KV heads of {projection.head_size}")
    return row[first : first + num_kv_heads * head_dim].reshape(num_kv_heads, head_dim)


def mean_rotated(rotary: torch.nn.Module, bias: torch.Tensor) -> torch.Tensor:
    """Of R(j) bias, [heads, head_dim] as bias, over the positions that the embedding knows: on a GPU an index beyond ends the process."""
    table = getattr(rotary, "cos_sin_cache", None)
    lengths = context_lengths(min(MOST_POSITIONS, rotary.max_position_embeddings if table is None else len(table)))
    stand_in = copy.copy(
        rotary
    )  # a call in another dtype replaces the buffer, and a captured CUDA graph reads the old one
    stand_in._buffers = {
        name: buffer.to(bias) if buffer is not None and buffer.is_floating_point() else buffer
        for name, buffer in rotary._buffers.items()
    }
    rotate = getattr(stand_in, "forward_native", stand_in.forward)
    heads, dim = bias.shape
    total = torch.zeros(heads, dim, dtype=torch.float64, device=bias.device)
    mean = torch.zeros_like(total)
    borders = sorted({0, *lengths, *range(0, lengths[-1], STEP)})
    for first, last in itertools.pairwise(borders):
        index = torch.arange(first, last, device=bias.device)
        keys = bias.reshape(1, -1).repeat(len(index), 1)
        _, rotated = rotate(index, keys.clone(), keys)
        total += rotated.reshape(len(index), heads, dim).sum(0, dtype=torch.float64)
        if last in lengths:
            mean += total / (last * len(lengths))
    return mean.float()


def offset_of(modules: dict[str, torch.nn.Module], name: str) -> torch.Tensor | None:
    """Of one attention layer; None if it has no key bias, or none that is worth it. Raises NoOffset."""
    from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

    layer, parent = modules[name], name.rpartition(".")[0]
    beside = children(modules, parent)
    projections = [x for key, x in beside.items() if key in PROJECTIONS and isinstance(x, QKVParallelLinear)]
    if len(projections) != 1:
        raise NoOffset("there is no projection of a known kind beside it")
    if projections[0].bias is None:
        return None
    rotaries = [x for x in beside.values() if is_rotary(x)]
    known = (layer, *projections, *rotaries)
    others = [x for x in beside.values() if not any(x is y for y in known) and not isinstance(x, RowParallelLinear)]
    if others:  # a norm of the keys, for one
        raise NoOffset(f"a {type(others[0]).__name__} stands beside it")
    while not rotaries and parent:
        parent = parent.rpartition(".")[0]
        if any(map(is_rotary, children(modules, parent).values())):
            raise NoOffset("it is not known whether it takes the rotary embedding above it")
    if len(rotaries) > 1:
        raise NoOffset("it has more than one rotary embedding")
    bias = key_bias(projections[0], layer.impl.num_kv_heads, layer.impl.head_size)
    norms = bias.norm(dim=-1)
    if not bool(norms.isfinite().all()):
        raise NoOffset("its bias is not finite")
    if not bool((norms > LEAST_NORM).any()):
        return None
    offset = mean_rotated(rotaries[0], bias) if rotaries else bias
    found = offset.norm(dim=-1)
    return offset if bool(((found > LEAST_NORM) & (found > LEAST_SHARE * norms)).any()) else None


@torch.no_grad()
def of_network(network: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Of each attention layer for which it is worth it [num_kv_heads, head_dim] in float32, with this rank's heads; and why layers get none
    that might be worth it."""
    from vllm.model_executor.layers.attention import Attention

    modules = dict(network.named_modules())
    layers = {name: module for name, module in modules.items() if isinstance(module, Attention)}
    read_otherwise = {
        layer.impl.kv_sharing_target_layer_name for layer in layers.values() if not is_invariant(layer.impl)
    }
    offsets, reasons = {}, {}
    for name, layer in layers.items():
        if layer.impl.kv_sharing_target_layer_name is not None:
            continue  # it has no keys of its own
        try:
            offset = offset_of(modules, name)
            if offset is not None and (not is_invariant(layer.impl) or layer.layer_name in read_otherwise):
                raise NoOffset("sinks or a soft cap see what is taken from all scores")
        except NoOffset as error:
            reasons[name] = str(error)
        except Exception as error:  # a module of the engine's met a call that it does not expect
            reasons[name] = f"{type(error).__name__}: {error}"
        else:
            if offset is not None:
                offsets[name] = offset
    return offsets, reasons


def subtracting(ours: type, network: torch.nn.Module) -> dict[str, Any]:
    """The implementations that want an offset."""
    impls = {name: getattr(module, "impl", None) for name, module in network.named_modules()}
    return {
        name: impl
        for name, impl in impls.items()
        if isinstance(impl, ours) and formats.subtracts_key_offset(impl.kv_cache_dtype)
    }


def offsets_after(
    ours: type, own: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any], dict[str, torch.Tensor], dict[str, str]]:
    """What vLLM's own function gave; and by layer the implementations that want an offset, their offsets, and why layers get none."""
    result = own(*args, **kwargs)
    network = inspect.signature(own).bind(*args, **kwargs).arguments["model"]  # by whatever way it was given
    impls = subtracting(ours, network)
    return result, impls, *(of_network(network) if impls else ({}, {}))


def loaded(ours: type, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """process_weights_after_loading with ours behind it: each implementation that wants an offset gets it."""
    result, impls, offsets, reasons = offsets_after(ours, own, args, kwargs)
    for name in impls.keys() & offsets.keys():
        impls[name].key_offset = offsets[name]
    if with_offset := sorted(impls.keys() & offsets.keys()):
        norms = {name: offsets[name].norm(dim=-1).max().item() for name in with_offset}
        top = max(norms, key=lambda name: norms[name])
        logger.info(
            "tq-backend takes a static offset from the keys of layers %s (largest: %.0f, in layer %s)",
            named(with_offset), norms[top], named([top]),
        )  # fmt: skip
    for reason in sorted({reasons[name] for name in impls.keys() & reasons.keys()}):
        without = [name for name in impls if reasons.get(name) == reason]
        logger.warning("tq-backend takes no offset from the keys of layers %s: %s", named(without), reason)
    return result


def reloaded(ours: type, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """finalize_layerwise_processing with ours behind it. A captured CUDA graph reads the same memory, and stores what it stored before: an
    offset is written in place, and no layer gets its first one here. A key that is left in a page from before lacks the old bias' mean as the new
    keys lack the new one's, so it is nearer to what the new weights would have made of it than it was."""
    result, impls, offsets, _ = offsets_after(ours, own, args, kwargs)
    for name, impl in impls.items():
        if impl.key_offset is not None:
            impl.key_offset.copy_(offsets[name]) if name in offsets else impl.key_offset.zero_()
    late = [name for name in impls.keys() & offsets.keys() if impls[name].key_offset is None]
    if late:
        logger.warning(
            "tq-backend takes no offset from the keys of layers %s, whose bias came with weights that were loaded later",
            named(late),
        )
    return result
