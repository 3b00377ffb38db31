"""Which layers are compressed, against what was asked: one line when the layers are known, and an error with `strict`.

vLLM leaves the cache dtype to each layer. A model's code that hands none to its layers gives them the native cache, and a list of
layers to skip may name them all; an engine whose cache is not compressed would then start without a word. So this reads the specs
that the layers made, and not what a model's configuration calls them.
"""

from __future__ import annotations

import logging
from typing import Any

from tq_backend.names import is_ours
from tq_backend.plan_text import ranges
from tq_backend.vllm_adapter.options import read_options
from tq_backend.vllm_adapter.specs import dtype_name, is_compressed, is_state

ARGUMENT = "additional_config['turboquant']['skip_layers']"


def default_list(kv_format: str | None) -> str:
    """What keeps layers native where the option names none."""
    if kv_format is None or is_ours(kv_format):
        return "vLLM's list of layers to skip"
    return f"{kv_format} does not hold their key bias, or --kv-cache-dtype-skip-layers names them"


def number(layer_name: str) -> int | None:
    """As vLLM numbers layers: the integer in a layer's name."""
    return next((int(part) for part in layer_name.split(".") if part.isdecimal()), None)


def is_skipped(layer_name: str, spec: Any, skipped: list[str]) -> bool:
    """Whether vLLM's rule (Attention.__init__) keeps it native."""
    has_window = getattr(spec, "sliding_window", None) is not None
    return str(number(layer_name)) in skipped or (has_window and "sliding_window" in skipped)


def named(layers: list[str]) -> str:
    """Layers by number; those without one by name."""
    numbers = sorted({n for n in map(number, layers) if n is not None})
    return ", ".join([*([ranges(numbers)] if numbers else []), *(name for name in layers if number(name) is None)])


def saving_per_token(specs: dict[str, Any], dtype: Any) -> str:
    """Of the layers with keys and values, without what the engine's page sizes add."""
    from vllm.utils.torch_utils import get_dtype_size

    layers = [spec for spec in specs.values() if not is_state(spec)]
    have = sum(spec.num_kv_heads * spec.state_content_size_bytes for spec in layers)
    native = sum(spec.num_kv_heads * (spec.head_size + spec.head_size_v) * get_dtype_size(dtype) for spec in layers)
    return f"{native / have:.1f}x fewer bytes per token than {dtype_name(dtype)}, without padding"


def without_effect(skipped: list[str], specs: dict[str, Any]) -> list[str]:
    """Entries of the list that keep no layer native: numbers of layers that have a state only, a kind that no layer is of."""
    states = {str(number(name)) for name, spec in specs.items() if is_state(spec)}
    others = {name: spec for name, spec in specs.items() if not is_state(spec)}
    return [
        entry
        for entry in skipped
        if (entry in states or not entry.isdecimal())
        and not any(is_skipped(name, spec, [entry]) for name, spec in others.items())
    ]


def line(vllm_config: Any, specs: dict[str, Any], saved: str) -> tuple[int, str]:
    """Level and text of the line at start-up. Raises ValueError with `strict` if layers are native that nobody named, if nothing is
    compressed, or if the list of layers to skip names what is not there."""
    options = read_options(vllm_config.additional_config)
    layers = {name: spec for name, spec in specs.items() if not is_state(spec)}
    native = [name for name, spec in layers.items() if not is_compressed(spec)]
    cache = vllm_config.cache_config
    by_list = [name for name in native if is_skipped(name, layers[name], cache.kv_cache_dtype_skip_layers)]
    by_model = [name for name in native if name not in by_list]
    text = f"compressed: {len(layers) - len(native)} of {len(layers)} layers" + (f", {saved}" if saved else "")
    if by_list:
        text += (
            f"; native: {named(by_list)} ({default_list(options.format) if options.skip_layers is None else ARGUMENT})"
        )
    if by_model:
        text += f"; native: {named(by_model)} (this model's code does not give them {cache.cache_dtype})"
    if states := len(specs) - len(layers):
        text += f"; {states} hold{'s' * (states == 1)} a state and no keys and values"
    wrong = []
    if len(native) == len(layers):
        remedy = f"set {ARGUMENT} to other layers, or to []" if by_list else "use --kv-cache-dtype auto or fp8 for it"
        wrong.append(f"{cache.cache_dtype} has no effect on this engine: {remedy}")
    elif by_model:
        wrong.append(f"{cache.cache_dtype} was asked for all layers but those of {ARGUMENT}")
    if idle := without_effect(list(options.skip_layers or ()), specs):
        wrong.append(f"{ARGUMENT} names {', '.join(idle)}, and no layer with keys and values is that")
    if not wrong or is_stage(vllm_config):
        return logging.INFO, text
    if options.strict:
        raise ValueError(f"tq-backend, strict: {text}. {'; '.join(wrong)}")
    return logging.WARNING, f"{text}. {'; '.join(wrong)}"


def is_stage(vllm_config: Any) -> bool:
    """Whether these are the layers of one pipeline stage: its worker groups them too, and only the engine sees them all."""
    from vllm.distributed.parallel_state import model_parallel_is_initialized

    return vllm_config.parallel_config.pipeline_parallel_size > 1 and model_parallel_is_initialized()
