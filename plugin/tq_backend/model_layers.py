"""What each layer of a model keeps between tokens, read from its config.json. No torch, no engine.

The rules are the ones by which vLLM 0.32 builds its layers (model_executor/models/ and layers/mamba/mamba_utils.py); the keys
are Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tq_backend._library import native

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BOUNDARY_LAYERS = 2  # of a dense model, at each end: TurboQuantConfig.get_boundary_skip_layers

# What published files of these types leave to their config class (transformers 5.19).
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 256, "sliding_window": 4096, "max_position_embeddings": 8192},
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
    },
    "nemotron_h": {"mamba_ssm_cache_dtype": "float32"},
}
# Every so many layers one has full attention, the last of them; for files without layer_types.
FULL_ATTENTION_INTERVAL = {"gemma2": 2, "gemma3_text": 6, "gemma3n_text": 5, "gemma4_text": 6, "gpt_oss": 2}
STATES = ("linear_attention", "mamba1", "mamba2")
PATTERN = {"M": "mamba2", "*": "full_attention", "-": "none", "E": "none"}  # hybrid_override_pattern
BLOCKS = {  # layers_block_type, which replaced it
    "linear_attention": "mamba2",
    "mamba": "mamba2",
    "full_attention": "full_attention",
    "attention": "full_attention",
    "mlp": "none",
    "moe": "none",
}
# Keys of architectures whose layers are not all attention; without a list of types by a name known here they are refused.
STATE_KEYS = ("mamba_", "ssm_", "linear_", "conv_L_", "conv_kernel", "lru_", "attn_layer_indices", "attn_type_list")


@dataclass(frozen=True)
class CacheLayer:
    """A layer with keys and values, or with a recurrent state."""

    number: int  # in the model; layers without a cache are left out
    num_kv_heads: int = 0  # of one device
    head_dim: int = 0
    sliding_window: int = 0
    kv_sharing_target: int = -1  # number of the layer whose cache is read
    state_bytes: int = 0  # per sequence, of one device


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of a config, with what its class fills in. Raises ValueError for MLA and for what is no decoder."""
    text = dict(config.get("text_config") or config.get("llm_config") or config)
    dtype = text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype")
    text["dtype"] = str(dtype or "bfloat16")
    for key, value in CLASS_DEFAULTS.get(text.get("model_type", ""), {}).items():
        text.setdefault(key, value)
    blocks = text.get("hybrid_override_pattern") or text.get("layers_block_type")
    if blocks is not None:  # the newer files give no count beside the list
        text.setdefault("num_hidden_layers", len(blocks))
    for key in ("num_hidden_layers", "num_attention_heads"):
        if not isinstance(text.get(key), int):
            raise ValueError(f"the config has no {key}; it must be the config.json of a decoder model")
    if text.get("kv_lora_rank") is not None:
        raise ValueError(
            "the config describes MLA attention, whose cache is not keys and values; these formats do not serve it, use "
            "--kv-cache-dtype auto or fp8"
        )
    if text["dtype"] not in DTYPE_BYTES:
        raise ValueError(f"the config's dtype is {text['dtype']}; it must be one of {', '.join(DTYPE_BYTES)}")
    return text


def layer_types(text: Mapping[str, Any]) -> list[str]:
    """One of full_attention, sliding_attention, linear_attention, mamba1, mamba2, none for each layer."""
    count = text["num_hidden_layers"]
    kind = text.get("model_type", "")
    if (pattern := text.get("hybrid_override_pattern")) is not None:
        unknown = set(pattern) - set(PATTERN)
        if unknown:
            raise ValueError(f"hybrid_override_pattern has {sorted(unknown)}; known are {' '.join(PATTERN)}")
        types = [PATTERN[letter] for letter in pattern]
    elif text.get("layers_block_type") is not None and kind == "nemotron_h":
        types = [BLOCKS.get(block, block) for block in text["layers_block_type"]]
    elif text.get("layer_types") is not None:
        types = list(text["layer_types"])
    elif "attn_layer_period" in text:
        period, offset = text["attn_layer_period"], text.get("attn_layer_offset", 0)
        types = ["full_attention" if i % period == offset else "mamba1" for i in range(count)]
    elif "linear_num_value_heads" in text:
        interval = text.get("full_attention_interval", 4)
        types = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(count)]
    elif kind in FULL_ATTENTION_INTERVAL:
        interval = text.get("sliding_window_pattern") or FULL_ATTENTION_INTERVAL[kind]
        types = ["sliding_attention" if (i + 1) % interval else "full_attention" for i in range(count)]
    elif strange := sorted(key for key in text if key.startswith(STATE_KEYS)):
        raise ValueError(
            f"the config is of a {kind or 'model'} with {', '.join(strange[:3])}, whose layers this version cannot tell apart"
        )
    else:
        windowed = text.get("sliding_window") is not None and text.get("use_sliding_window", True)
        types = ["sliding_attention" if windowed else "full_attention"] * count
    if len(types) != count:
        raise ValueError(f"the config names the types of {len(types)} layers and has {count}")
    known = {"full_attention", "sliding_attention", "none", *STATES}
    other = sorted(set(types) - known)
    if other:
        numbers = [i for i, t in enumerate(types) if t in other]
        raise ValueError(f"layers {numbers} have the type {', '.join(other)}; planned are {', '.join(sorted(known))}")
    return types


def kv_sharing_targets(config: Mapping[str, Any]) -> list[int]:
    """Of each layer the number of the one whose cache it reads, or -1: the last num_kv_shared_layers read the last one of
    their type before them (YOCO; Gemma 3n, Gemma 4)."""
    text = text_config(config)
    types = layer_types(text)
    own = len(types) - (text.get("num_kv_shared_layers") or 0)
    targets = [-1] * len(types)
    for i in range(own, len(types)):
        if types[i] not in types[:own]:
            raise ValueError(f"layer {i} reads another one's cache and no {types[i]} layer comes before layer {own}")
        targets[i] = own - 1 - types[:own][::-1].index(types[i])
    return targets


def divided(name: str, count: int, tp: int, replicate: bool = False) -> int:
    """Heads of one device. Keys and values of fewer heads than devices are replicated."""
    if count % tp == 0:
        return count // tp
    if replicate and tp % count == 0:
        return 1
    raise ValueError(f"{name} is {count} and --tp is {tp}; one of them must be a multiple of the other" if replicate
                     else f"{name} is {count} and --tp is {tp}, which does not divide it")  # fmt: skip


def state_bytes(text: Mapping[str, Any], kind: str, tp: int) -> int:
    """Convolution and recurrent state of one layer of one device, as vLLM's MambaStateShapeCalculator sizes them."""
    conv_bytes = DTYPE_BYTES[text["dtype"]]
    state_dtype = str(text.get("mamba_ssm_cache_dtype") or text.get("mamba_ssm_dtype") or text["dtype"])
    if kind == "linear_attention":
        keys, values = text["linear_num_key_heads"], text["linear_num_value_heads"]
        key_dim, value_dim = text["linear_key_head_dim"], text["linear_value_head_dim"]
        channels = divided("linear_num_key_heads", keys, tp) * key_dim * 2
        channels += divided("linear_num_value_heads", values, tp) * value_dim
        width, state = text["linear_conv_kernel_dim"] - 1, values // tp * value_dim * key_dim
    elif kind == "mamba2":
        heads, head_dim, size = text["mamba_num_heads"], text["mamba_head_dim"], text["ssm_state_size"]
        groups = text["n_groups"] if text["n_groups"] % tp == 0 else tp  # shards of heads need their group beside them
        channels = divided("mamba_num_heads", heads, tp) * head_dim + 2 * groups // tp * size
        width, state = text["conv_kernel"] - 1, heads // tp * head_dim * size
    else:
        channels = divided("the Mamba width", text["mamba_expand"] * text["hidden_size"], tp)
        width, state = text["mamba_d_conv"] - 1, channels * text["mamba_d_state"]
    return channels * width * conv_bytes + state * DTYPE_BYTES[state_dtype]


def layer_overrides(text: Mapping[str, Any], number: int, kind: str) -> dict[str, Any]:
    """What one layer has otherwise than the rest. Gemma 4's full-attention layers have wider and, where a key is its value
    too, fewer heads; its config class writes that as per_layer_config."""
    if (per_layer := text.get("per_layer_config")) is not None:
        return next((dict(own) for key, own in per_layer.items() if int(key) == number), {})  # "05" is a key too
    if kind != "full_attention" or text.get("model_type") != "gemma4_text":
        return {}
    overrides = {"head_dim": text.get("global_head_dim", 512)}
    if text.get("attention_k_eq_v") and text.get("num_global_key_value_heads"):
        overrides["num_key_value_heads"] = text["num_global_key_value_heads"]
    return overrides


def cache_layers(config: Mapping[str, Any], tp: int = 1) -> list[CacheLayer]:
    """The layers that have a cache, on one of tp devices. Raises ValueError with a sentence for what is not planned."""
    text = text_config(config)
    types = layer_types(text)
    targets = kv_sharing_targets(config)
    layers = []
    for number, kind in enumerate(types):
        if kind in STATES:
            try:
                layers.append(CacheLayer(number, state_bytes=state_bytes(text, kind, tp)))
            except KeyError as error:
                raise ValueError(
                    f"layer {number} is {kind} and the config has no {error.args[0]}, which gives its size"
                ) from error
        elif kind != "none":
            own = text | layer_overrides(text, number, kind)
            heads = own.get("num_key_value_heads") or own["num_attention_heads"]
            layers.append(
                CacheLayer(
                    number,
                    num_kv_heads=divided("num_key_value_heads", heads, tp, replicate=True),
                    head_dim=own.get("head_dim") or own["hidden_size"] // own["num_attention_heads"],
                    sliding_window=own["sliding_window"] if kind == "sliding_attention" else 0,
                    kv_sharing_target=targets[number],
                )
            )
    return layers


def skip_layers(config: Mapping[str, Any], named: list[int] | None = None) -> list[int]:
    """The layers that keep the native cache: those named, or vLLM's choice (the first and last two, none in a model with
    states), and every layer that shares a cache with one of them."""
    hybrid = any(layer.state_bytes for layer in cache_layers(config))
    boundary = 0 if named is not None or hybrid else BOUNDARY_LAYERS
    return native().align_skip_layers(kv_sharing_targets(config), named or [], boundary)


def plan_layers(layers: list[CacheLayer], format_name: str | None, native_bytes: int, skipped: list[int]) -> list[dict]:
    """The planner's argument: layers in this format (None: all native), and the skipped ones native."""
    index = {layer.number: i for i, layer in enumerate(layers)}
    return [
        {
            "format": None if layer.number in skipped else format_name,
            "native_bytes": native_bytes,
            "num_kv_heads": layer.num_kv_heads,
            "head_dim": layer.head_dim,
            "sliding_window": layer.sliding_window,
            "kv_sharing_target": index.get(layer.kv_sharing_target, -1),
            "state_bytes": layer.state_bytes,
        }
        for layer in layers
    ]
