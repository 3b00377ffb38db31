"""Whether the preset of an engine is known to lose accuracy on its model: one line, when the layers are known.

Then a model that came from a hub is on disk too, and the specs say which layers are compressed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tq_backend import key_bias
from tq_backend.vllm_adapter import coverage, formats
from tq_backend.vllm_adapter.specs import is_compressed


def model_folder(vllm_config: Any) -> Path:
    """Of the weights. A path that does not exist where it cannot be told."""
    model = vllm_config.model_config
    folder = Path(model.model)
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(
        model.model, "config.json", cache_dir=vllm_config.load_config.download_dir, revision=model.revision
    )
    return Path(found).parent if isinstance(found, str) else folder


def is_rank(vllm_config: Any) -> bool:
    """Whether this is one of several workers: they group layers too while they profile, and the engine speaks for them."""
    from vllm.distributed.parallel_state import model_parallel_is_initialized

    parallel = vllm_config.parallel_config
    return parallel.tensor_parallel_size * parallel.pipeline_parallel_size > 1 and model_parallel_is_initialized()


def line(vllm_config: Any, specs: dict[str, Any]) -> str:
    """ "" if nothing is known against it. Weights that cannot be read, of whatever kind they are, are no reason to say anything."""
    try:
        if vllm_config.load_config.load_format == "dummy" or is_rank(vllm_config):
            return ""
        model = vllm_config.model_config
        text = model.hf_text_config
        heads = key_bias.Heads(
            text.model_type, text.num_attention_heads, model.get_total_num_kv_heads(), model.get_head_size()
        )
        biases = key_bias.read(model_folder(vllm_config), heads)
    except (AttributeError, ImportError, OSError, TypeError, ValueError):
        return ""
    compressed = {coverage.number(name) for name, spec in specs.items() if is_compressed(spec)}
    native_layers = [bias.layer for bias in biases if bias.layer not in compressed]
    return key_bias.sentence(formats.page_format(vllm_config.cache_config.cache_dtype), biases, native_layers)
