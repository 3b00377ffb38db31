"""What each layer of a model keeps between tokens, from its configuration (`model_text.py` reads that). No torch, no engine.

The rules are the ones by which vLLM 0.32 builds its layers (model_executor/models/ and layers/mamba/mamba_utils.py); the keys
are Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tq_backend._library import native
from tq_backend.model_text import DTYPE_BYTES, MOST_HEADS, MOST_TOKENS, number, shown, text_config
from tq_backend.names import is_ours

BOUNDARY_LAYERS = 2  # of a dense model, at each end: TurboQuantConfig.get_boundary_skip_layers
# Every so many layers one has full attention, the last of them; for files without layer_types.
FULL_ATTENTION_INTERVAL = {
    "cohere2": 4, "exaone4": 4, "gemma2": 2, "gemma3_text": 6, "gemma3n_text": 5, "gemma4_text": 6, "gpt_oss": 2, "olmo3": 4,
}  # fmt: skip
# Models whose code in vLLM gives each layer its own window; others ignore such a list.
WINDOWS_BY_LAYER = frozenset(
    (*FULL_ATTENTION_INTERVAL, "afmoe", "apertus", "cohere2_moe", "diffusion_gemma_text", "exaone_moe", "gemma4_unified_text", "granite",
     "granite_swa", "granitemoe", "granitemoe_swa", "laguna", "llama", "ministral3", "mistral", "muse_glimmer_text", "phi3")
)  # fmt: skip
# Their windowed layers attend to so many tokens beside sliding_window.
WINDOW_OFFSET = {"cohere2": 1, "cohere2_moe": 1}
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
# layer_types of some classes, under the names that all others use
TYPE_NAMES = {
    "attention": "full_attention",
    "global_attention": "full_attention",
    "local_attention": "sliding_attention",
}
BY_BLOCKS = "nemotron-nas"
# Models whose files call Mamba 2 otherwise
MAMBA2_TYPES = ("granitemoehybrid", "bamba")


@dataclass(frozen=True)
class CacheLayer:
    """A layer with keys and values, or with a recurrent state."""

    number: int  # in the model; layers without a cache are left out
    num_kv_heads: int = 0  # of one device
    head_dim: int = 0
    sliding_window: int = 0
    kv_sharing_target: int = -1  # number of the layer whose cache is read
    state_bytes: int = 0  # per sequence, of one device


def listed(text: Mapping[str, Any], key: str) -> list[Any]:
    value = text.get(key)
    if not isinstance(value, list | tuple) or len(value) != text["num_hidden_layers"]:
        raise ValueError(
            f"the config's {key} is {shown(value)}; it must be a list with one entry for each of the "
            f"{text['num_hidden_layers']} layers"
        )
    return list(value)


def block_types(text: Mapping[str, Any]) -> list[str]:
    """Of block_configs (Nemotron Super and Ultra), where a searched-for architecture leaves attention out of some layers."""
    types = []
    for i, block in enumerate(listed(text, "block_configs")):
        attention = block.get("attention") if isinstance(block, Mapping) else None
        if not isinstance(attention, Mapping) or attention.get("replace_with_linear") or attention.get("sparsify"):
            raise ValueError(
                f"block_configs[{i}] of the config is {shown(block)}, whose attention this version does not know"
            )
        types.append("none" if attention.get("no_op") else "full_attention")
    return types


def intervals(text: Mapping[str, Any], kind: str) -> list[str] | None:
    """Types of a model that gives them as "every so many layers", or None."""
    count = text["num_hidden_layers"]
    if "attn_layer_period" in text:
        period = number(text, "attn_layer_period", count)
        offset = number({"attn_layer_offset": 0, **text}, "attn_layer_offset", count, 0)
        return ["full_attention" if i % period == offset else "mamba1" for i in range(count)]
    if text.get("linear_num_value_heads") is not None:
        interval = number({"full_attention_interval": 4, **text}, "full_attention_interval", count)
        return ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(count)]
    if (usual := FULL_ATTENTION_INTERVAL.get(kind)) is None and not text.get("sliding_window_pattern"):
        return None
    if usual is None:
        raise ValueError(f"the config is of a {kind} with sliding_window_pattern, which this version cannot place")
    key = next(
        (key for key in ("sliding_window_pattern", "_sliding_window_pattern") if text.get(key) is not None), None
    )
    if key is not None and isinstance(text[key], str):  # "LLLG": local and global
        pattern = text[key]
        if not pattern or set(pattern) - {"L", "G"}:
            raise ValueError(f"the config's {key} is {shown(pattern)}; it must be made of L and G, or be a number")
        return ["sliding_attention" if pattern[i % len(pattern)] == "L" else "full_attention" for i in range(count)]
    interval = usual if key is None else number(text, key, MOST_TOKENS)
    return ["sliding_attention" if (i + 1) % interval else "full_attention" for i in range(count)]


def listed_types(text: Mapping[str, Any], kind: str) -> list[str] | None:
    """Types of a model that has a list of them, or None."""
    if kind == BY_BLOCKS:
        return block_types(text)
    if (pattern := text.get("hybrid_override_pattern")) is not None:
        unknown = set(pattern) - set(PATTERN) if isinstance(pattern, str) else {shown(pattern)}
        if unknown:
            raise ValueError(f"hybrid_override_pattern has {sorted(unknown)}; known are {' '.join(PATTERN)}")
        return [PATTERN[letter] for letter in pattern]
    if text.get("layers_block_type") is not None and kind == "nemotron_h":
        return [BLOCKS.get(str(block), str(block)) for block in listed(text, "layers_block_type")]
    if text.get("layer_types") is not None:
        types = [TYPE_NAMES.get(str(name), str(name)) for name in listed(text, "layer_types")]
        # linear_attention is what transformers makes of a Granite's mamba
        mamba2 = ("mamba", "linear_attention") if kind in MAMBA2_TYPES else ()
        return ["mamba2" if name in mamba2 else name for name in types]
    if text.get("attn_type_list") is not None:  # MiniMax: 1 is softmax attention
        return [
            "full_attention" if entry == 1 else f"attn_type {shown(entry)}" for entry in listed(text, "attn_type_list")
        ]
    return None


def windowed_types(text: Mapping[str, Any]) -> list[str]:
    """Types of a model that only has sliding_window: one for all layers."""
    windowed = text.get("sliding_window") is not None and text.get("use_sliding_window", True)
    return ["sliding_attention" if windowed else "full_attention"] * text["num_hidden_layers"]


def check_windows(text: Mapping[str, Any], kind: str, types: list[str]) -> None:
    """Raises ValueError where it is not certain which layers have a window."""
    if text.get("sliding_window") is None:
        return
    if text.get("use_sliding_window") and text.get("max_window_layers") is not None:
        raise ValueError(
            f"the config sets use_sliding_window of a {kind}: which of its layers then have a window is one thing in its class and "
            "another in the engine's code"
        )
    if {"sliding_attention", "full_attention"} <= set(types) and kind not in WINDOWS_BY_LAYER:
        raise ValueError(
            f"the config gives some layers of a {kind} a window, and the engine's code for it is not known to follow that"
        )


def layer_types(text: Mapping[str, Any]) -> list[str]:
    """One of full_attention, sliding_attention, linear_attention, mamba1, mamba2, none for each layer."""
    count, kind = text["num_hidden_layers"], str(text.get("model_type", ""))
    types = listed_types(text, kind) or intervals(text, kind) or windowed_types(text)
    if len(types) != count:
        raise ValueError(f"the config names the types of {len(types)} layers and has {count}")
    if kind == "gemma4_text":
        types[-1] = "full_attention"  # whatever the file says: its class forces it
    known = {"full_attention", "sliding_attention", "none", *STATES}
    other = sorted(set(types) - known)
    if other:
        numbers = [i for i, t in enumerate(types) if t in other]
        raise ValueError(
            f"layers {shown(numbers)} have the type {shown(', '.join(other))}; planned are {', '.join(sorted(known))}"
        )
    check_windows(text, kind, types)
    if kind == "nemotron_h" and text.get("sliding_window"):
        types = ["sliding_attention" if name == "full_attention" else name for name in types]
    if "sliding_attention" in types and not text.get("sliding_window") and text.get("sliding_windows") is None:
        raise ValueError(f"layer {types.index('sliding_attention')} has a window and the config has no sliding_window")
    return types


def kv_sharing_targets(config: Mapping[str, Any]) -> list[int]:
    """Of each layer the number of the one whose cache it reads, or -1: the last num_kv_shared_layers read the last one of
    their type before them (YOCO; Gemma 3n, Gemma 4)."""
    text = text_config(config)
    types = layer_types(text)
    own = len(types) - number({**text, "num_kv_shared_layers": text.get("num_kv_shared_layers") or 0}, "num_kv_shared_layers",
                              len(types) - 1, 0)  # fmt: skip
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


def state_number(text: Mapping[str, Any], *names: str) -> int:
    """One of the sizes that make a state, under the first of its names that is there. Raises KeyError with the first if none is."""
    for name in names:
        if text.get(name) is not None:
            return number(text, name, 2**20)
    raise KeyError(names[0])


def state_dtype_bytes(text: Mapping[str, Any]) -> int:
    name = str(text.get("mamba_ssm_cache_dtype") or text.get("mamba_ssm_dtype") or text["dtype"]).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise ValueError(f"the config's state dtype is {shown(name)}; it must be one of {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[name]


def mamba2_head_dim(text: Mapping[str, Any], heads: int) -> int:
    if (
        text.get("mamba_d_head", "auto") == "auto" and text.get("mamba_head_dim") is None
    ):  # Granite's and Bamba's classes
        return state_number(text, "mamba_expand") * state_number(text, "hidden_size") // heads
    return state_number(text, "mamba_head_dim", "mamba_d_head")


def state_bytes(text: Mapping[str, Any], kind: str, tp: int) -> int:
    """Convolution and recurrent state of one layer of one device, as vLLM's MambaStateShapeCalculator sizes them."""
    if kind == "linear_attention":
        keys, values = state_number(text, "linear_num_key_heads"), state_number(text, "linear_num_value_heads")
        key_dim, value_dim = state_number(text, "linear_key_head_dim"), state_number(text, "linear_value_head_dim")
        channels = divided("linear_num_key_heads", keys, tp) * key_dim * 2
        channels += divided("linear_num_value_heads", values, tp) * value_dim
        width, state = state_number(text, "linear_conv_kernel_dim") - 1, values // tp * value_dim * key_dim
    elif kind == "mamba2":
        heads = state_number(text, "mamba_num_heads", "mamba_n_heads")
        head_dim, size = mamba2_head_dim(text, heads), state_number(text, "ssm_state_size", "mamba_d_state")
        groups = state_number(text, "n_groups", "mamba_n_groups")
        groups = groups if groups % tp == 0 else tp  # shards of heads need their group beside them
        channels = divided("mamba_num_heads", heads, tp) * head_dim + 2 * groups // tp * size
        width, state = state_number(text, "conv_kernel", "mamba_d_conv") - 1, heads // tp * head_dim * size
    else:
        inner = state_number(text, "mamba_expand") * state_number(text, "hidden_size")
        channels = divided("the Mamba width", inner, tp)
        width, state = state_number(text, "mamba_d_conv") - 1, channels * state_number(text, "mamba_d_state")
    return channels * width * DTYPE_BYTES[text["dtype"]] + state * state_dtype_bytes(text)


def layer_overrides(text: Mapping[str, Any], index: int, kind: str) -> dict[str, Any]:
    """What one layer has otherwise than the rest. Gemma 4's full-attention layers have wider and, where a key is its value
    too, fewer heads; its config class writes that as per_layer_config."""
    if (per_layer := text.get("per_layer_config")) is not None:
        if not isinstance(per_layer, Mapping) or not all(isinstance(own, Mapping) for own in per_layer.values()):
            raise ValueError(f"the config's per_layer_config is {shown(per_layer)}; it must be an object of objects")
        # "05" is a key too
        return next((dict(own) for key, own in per_layer.items() if str(key).isdigit() and int(key) == index), {})
    if text.get("model_type") == BY_BLOCKS:
        attention = text["block_configs"][index]["attention"]
        heads = text["num_attention_heads"]
        group = number(attention, "n_heads_in_group", heads)
        return {"num_key_value_heads": heads // group}
    if kind != "full_attention" or text.get("model_type") != "gemma4_text":
        return {}
    overrides = {"head_dim": text.get("global_head_dim", 512)}
    if text.get("attention_k_eq_v") and text.get("num_global_key_value_heads"):
        overrides["num_key_value_heads"] = text["num_global_key_value_heads"]
    return overrides


def window_of(text: Mapping[str, Any], index: int, kind: str) -> int:
    if kind != "sliding_attention":
        return 0
    each = text.get("sliding_windows")  # K-EXAONE 2
    own = {"sliding_windows": listed(text, "sliding_windows")[index]} if each is not None else text
    window = number(own, "sliding_windows" if each is not None else "sliding_window", MOST_TOKENS - 1)
    return window + WINDOW_OFFSET.get(str(text.get("model_type")), 0)


def cache_layers(config: Mapping[str, Any], tp: int = 1) -> list[CacheLayer]:
    """The layers that have a cache, on one of tp devices. Raises ValueError with a sentence for what is not planned."""
    text = text_config(config)
    types = layer_types(text)
    targets = kv_sharing_targets(config)
    layers = []
    for index, kind in enumerate(types):
        if kind in STATES:
            try:
                layers.append(CacheLayer(index, state_bytes=state_bytes(text, kind, tp)))
            except KeyError as error:
                raise ValueError(
                    f"layer {index} is {kind} and the config has no {error.args[0]}, which gives its size"
                ) from error
        elif kind != "none":
            own = text | layer_overrides(text, index, kind)
            heads = number(own, "num_key_value_heads", MOST_HEADS)
            layers.append(
                CacheLayer(
                    index,
                    num_kv_heads=divided("num_key_value_heads", heads, tp, replicate=True),
                    head_dim=number(own, "head_dim", MOST_HEADS),
                    sliding_window=window_of(own, index, kind),
                    kv_sharing_target=targets[index],
                )
            )
    if not layers:
        raise ValueError("no layer of the config has a cache")
    return layers


def skip_layers(config: Mapping[str, Any], format_name: str, named: list[int] | None = None) -> list[int]:
    """The layers that keep the native cache: those named, or vLLM's choice for its presets (the first and last two, none in a model
    with states), and every layer that shares a cache with one of them."""
    hybrid = any(layer.state_bytes for layer in cache_layers(config))
    boundary = 0 if named is not None or hybrid or not is_ours(format_name) else BOUNDARY_LAYERS
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
