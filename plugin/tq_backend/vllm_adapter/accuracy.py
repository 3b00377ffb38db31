"""On which layers of its model the format of an engine is known to lose accuracy: from the weights on disk, which have the key biases.

Asked twice. When the configuration is made, for the layers that keep the native cache by default: a model with key biases that is still to
come from a hub comes then, or its first start would serve other answers than all later ones. And when the layers are known, for one line
about those that are compressed nevertheless.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from tq_backend import key_bias
from tq_backend.names import LOGGER
from tq_backend.static_offset import rotary_of
from tq_backend.vllm_adapter import coverage, formats
from tq_backend.vllm_adapter.specs import is_compressed

logger = logging.getLogger(LOGGER)

# Load formats whose weights are a hub's safetensors.
HUB_FORMATS = ("auto", "hf", "safetensors")
# Of configurations whose key projection may have a bias; Qwen's has one without saying so.
BIAS_KEYS = (
    "attention_bias", "attn_bias", "use_attention_bias", "qkv_bias", "use_qkv_bias", "add_qkv_bias", "add_bias_linear", "use_bias", "bias",
)  # fmt: skip


def model_folder(model: Any, download_dir: str | None) -> Path:
    """Of the weights. A path that does not exist where it cannot be told."""
    folder = Path(model.model)
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.model, "config.json", cache_dir=download_dir, revision=model.revision)
    return Path(found).parent if isinstance(found, str) else folder


def biases_of(model: Any, load: Any) -> list[key_bias.KeyBias]:
    """Of a ModelConfig's weights. None of weights that cannot be read, of whatever kind they are. load: a LoadConfig, or EngineArgs, which
    have the same names."""
    try:
        if load.load_format == "dummy":
            return []
        text = model.hf_text_config
        dim = model.get_head_size()
        rotary = rotary_of(text.to_dict(), dim, model.max_model_len)
        heads = key_bias.Heads(text.model_type, text.num_attention_heads, model.get_total_num_kv_heads(), dim, rotary)
        return key_bias.read(model_folder(model, load.download_dir), heads)
    except (AttributeError, ImportError, OSError, TypeError, ValueError):
        return []


def may_have_bias(text: Any) -> bool:
    kind = str(getattr(text, "model_type", ""))
    return kind == "qwen" or kind.startswith("qwen2") or any(getattr(text, key, None) is True for key in BIAS_KEYS)


def fetch(model: Any, load: Any) -> None:
    """As vLLM's loader would do it a little later. Without a network it fails there, with vLLM's own words."""
    if load.load_format not in HUB_FORMATS or not may_have_bias(model.hf_text_config) or Path(model.model).is_dir():
        return
    try:
        from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf

        download_weights_from_hf(model.model, load.download_dir, ["*.safetensors"], model.revision)
    except Exception as error:  # a network's, a hub's, a file system's; what is not known is said when the layers are
        logger.info("tq-backend: the weights of %s cannot be read before they are loaded: %s", model.model, error)


def native_by_default(kv_format: str, engine_args: Any, model: Any) -> list[int]:
    """The layers that keep the native cache under a format of ours, if nobody names any."""
    if kv_format in key_bias.HOLDS_ALL:
        return []
    fetch(model, engine_args)
    biases = biases_of(model, engine_args)
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
    biases = biases_of(vllm_config.model_config, getattr(vllm_config, "load_config", None))
    compressed = {coverage.number(name) for name, spec in specs.items() if is_compressed(spec)}
    native_layers = [bias.layer for bias in biases if bias.layer not in compressed]
    return key_bias.sentence(formats.page_format(vllm_config.cache_config.cache_dtype), biases, native_layers)
