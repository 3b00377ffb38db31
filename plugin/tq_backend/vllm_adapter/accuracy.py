"""On which layers of its model the format of an engine is known to lose accuracy: from the weights on disk, which have the key biases.

Asked twice. When the configuration is made, for the layers that keep the native cache by default; a model that is still to come from a hub
has no weights then. And when the layers are known, for one line about those that are compressed nevertheless.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tq_backend import key_bias
from tq_backend.static_offset import rotary_of
from tq_backend.vllm_adapter import coverage, formats
from tq_backend.vllm_adapter.specs import is_compressed


def model_folder(model: Any, download_dir: str | None) -> Path:
    """Of the weights. A path that does not exist where it cannot be told."""
    folder = Path(model.model)
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.model, "config.json", cache_dir=download_dir, revision=model.revision)
    return Path(found).parent if isinstance(found, str) else folder


def biases_of(model: Any, load_format: Any, download_dir: str | None) -> list[key_bias.KeyBias]:
    """Of a ModelConfig's weights. None of weights that cannot be read, of whatever kind they are."""
    if load_format == "dummy":
        return []
    try:
        text = model.hf_text_config
        dim = model.get_head_size()
        rotary = rotary_of(text.to_dict(), dim, model.max_model_len)
        heads = key_bias.Heads(text.model_type, text.num_attention_heads, model.get_total_num_kv_heads(), dim, rotary)
        return key_bias.read(model_folder(model, download_dir), heads)
    except (AttributeError, ImportError, OSError, TypeError, ValueError):
        return []


def native_by_default(kv_format: str, engine_args: Any, model: Any) -> list[int]:
    """The layers that keep the native cache under a format of ours, if nobody names any."""
    biases = biases_of(model, getattr(engine_args, "load_format", None), getattr(engine_args, "download_dir", None))
    return key_bias.native_by_default(kv_format, biases) or []


def is_rank(vllm_config: Any) -> bool:
    """Whether this is one of several workers: they group layers too while they profile, and the engine speaks for them."""
    from vllm.distributed.parallel_state import model_parallel_is_initialized

    parallel = vllm_config.parallel_config
    return parallel.tensor_parallel_size * parallel.pipeline_parallel_size > 1 and model_parallel_is_initialized()


def line(vllm_config: Any, specs: dict[str, Any]) -> str:
    """ "" if nothing is known against it."""
    if is_rank(vllm_config):
        return ""
    load = vllm_config.load_config
    biases = biases_of(vllm_config.model_config, load.load_format, load.download_dir)
    compressed = {coverage.number(name) for name, spec in specs.items() if is_compressed(spec)}
    native_layers = [bias.layer for bias in biases if bias.layer not in compressed]
    return key_bias.sentence(formats.page_format(vllm_config.cache_config.cache_dtype), biases, native_layers)
