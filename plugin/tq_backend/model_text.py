"""The language model's part of a configuration, in one vocabulary, or a sentence why there is no plan for it.

Configurations name the same fact differently (n_layer, num_layers, num_hidden_layers), nest it, or leave it to their class; and
some describe attention that has another cache than keys and values per layer. What is returned here has checked numbers under one
name each: num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim, max_position_embeddings (None if there is none)
and sliding_window. No torch, no engine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tq_backend.class_defaults import CLASS_DEFAULTS

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Where a configuration of several models keeps its language model's.
NESTED = ("thinker_config", "text_config", "llm_config", "language_config")
# One fact, many names; the first that is there counts.
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads")
WIDTH = ("hidden_size", "n_embd", "d_model")
KV_HEADS = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num", "num_attention_groups")
HEAD_DIMS = ("head_dim", "v_head_dim", "global_head_dim")
# The smallest of these is the model's length, except that model_max_length decides alone, as in vLLM.
LENGTHS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions", "max_sequence_length",
    "max_seq_length", "seq_len",
)  # fmt: skip
SCALED_BY_FACTOR = ("linear", "dynamic", "ntk")  # of rope types; the others' length is the scaled one already
FALCONS = ("falcon", "RefinedWeb", "RefinedWebModel")

# More than any model has; beyond them, a number is a mistake, and some would not fit the planner's 32-bit fields.
MOST_LAYERS, MOST_HEADS, MOST_TOKENS, MOST_WIDTH = 4096, 65_535, 2**31 - 1, 2**24

ENCODERS = re.compile(  # of model_type
    r"albert|align|altclip|aimv2|bert|camembert|canine|chinese_clip|clap|clip|clip_(text|vision)_model|clvp|convbert|"
    r"data2vec-text|deberta(-v2)?|dinov2|dinov3_vit|distilbert|dpr|electra|ernie|esm|eurobert|flaubert|flava|gte|hubert|jina_clip|"
    r"layoutlm(v[23])?|longformer|luke|metaclip_2|mobilebert|modernbert|mpnet|mra|new|nomic_bert|nystromformer|owlv2|owlvit|"
    r"(xlm-)?roberta(-prelayernorm|-xl)?|roc_bert|roformer|siglip2?|siglip2?_(text|vision)_model|squeezebert|swin|vit|wav2vec2|xlm|"
    r"xmod|yoso"
)
NOT_GENERATING = re.compile(
    r"For(MaskedLM|PreTraining|(Sequence|Token|Image|Audio|Video)Classification|QuestionAnswering|MultipleChoice|Retrieval|"
    r"NextSentencePrediction|CTC)$|^(Bert|Roberta|XLMRoberta|CLIP|Siglip|Siglip2)\w*Model$"
)

# Keys whose values are numbers (or lists of them); a class would refuse other values too, but only after it was imported.
NUMERIC = re.compile(r"^(num|n)_|_(size|dim|heads|layers|eps|theta|layernorm_epsilon)$")
# A key that is set, sounds as if the cache depended on it, and is in none of the lists below is refused: a plan that ignores it may
# be wrong by any factor.
WEIGHTY = re.compile(
    r"head|kv|window|sliding|attn|attention|layer|block|chunk|sparse|indexer|mamba|ssm|conv|state|linear|local|global|swa|hybrid|"
    r"recur|lru|compress|group|lora_rank|query|queries|pattern|share|retention|rwkv|cache"
)
READ = frozenset(
    (*LAYERS, *HEADS, *KV_HEADS, *NESTED, *LENGTHS, "head_dim", "v_head_dim", "hidden_size_per_head", "kv_channels", "kv_lora_rank",
     "multi_query", "multi_query_attention", "new_decoder_architecture",
     "sliding_window", "sliding_windows", "sliding_window_pattern", "_sliding_window_pattern", "use_sliding_window",
     "max_window_layers", "layer_types", "layers_block_type", "hybrid_override_pattern", "attn_type_list",
     "attn_layer_period", "attn_layer_offset", "full_attention_interval", "num_kv_shared_layers", "per_layer_config",
     "global_head_dim", "num_global_key_value_heads", "attention_k_eq_v", "use_bidirectional_attention",
     "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim")
)  # fmt: skip
HARMLESS = re.compile(
    r"bias|drop|norm|epsilon|expert|moe|mlp|ffn|feed_forward|scal|softcap|multiplier|mtp|nextn|next_n|rope|rotary|vision|image|audio|"
    r"video|vocab|initializer|dtype|residual|temperature|quant|upcast|softmax|sink|clip|pdrop|use_cache|topk_group|n_group$|"
    r"^(attn|attention)_implementation$|^_attn|qk_layernorm|query_pre_attn_scalar|parallel_attn|share_q_dim|"
    r"cache_implementation|attn_output_gate|hidden_size_per_layer_input|first_k_dense|layers_enum|num_dense_layers|"
    r"no_rope_layer|order_of_interleaved_layers|layer_switch|deepstack|local_files|^chunk_size_feed|tie_|num_labels|"
    r"output_attentions|output_hidden_states|is_decoder|cross_attention_hidden_size|pruned_heads|alibi|interleave_moe|"
    r"intermediate|sparsity|decoder_sparse_step|apply_query_key|ple_|hidden_states|use_mamba_kernels|add_cross_attention|num_attention_heads_per_layer"
)
OF_ONE_TYPE = {"attn_config": "dbrx", "block_configs": "nemotron-nas"}  # read for that type alone
# Keys of layers that are not attention; they matter only where no list says which layers those are.
STATE_KEYS = re.compile(
    r"^(mamba_|ssm_|linear_|conv_|lru_|n_mamba|use_conv|time_step|state_size|n_groups$|chunk_size$)"
)
TYPE_LISTS = (
    "hybrid_override_pattern",
    "layers_block_type",
    "layer_types",
    "attn_layer_period",
    "linear_num_value_heads",
    "block_configs",
)


class FilledIn(dict):
    """A language model's configuration that its own class has read: nothing is left to defaults."""


def shown(value: object) -> str:
    """A value for a sentence, however long it is."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def number(config: Mapping[str, Any], key: str, most: int, least: int = 1) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"the config's {key} is {shown(value)}; it must be a whole number from {least} to {most}")
    return value


def optional_number(config: Mapping[str, Any], key: str, most: int, least: int = 1) -> int | None:
    return None if config.get(key) is None else number(config, key, most, least)


def named(config: Mapping[str, Any], names: tuple[str, ...], most: int) -> int | None:
    key = next((name for name in names if config.get(name) is not None), None)
    return None if key is None else number(config, key, most)


def check_generates(config: Mapping[str, Any]) -> None:
    """Raises ValueError for a model that has no cache of tokens already generated."""
    kind = config.get("model_type")
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ValueError(f"the config's architectures is {shown(architectures)}; it must be a list of names")
    other = [name for name in architectures if NOT_GENERATING.search(name)]
    if (isinstance(kind, str) and ENCODERS.fullmatch(kind)) or (other and len(other) == len(architectures)):
        raise ValueError(
            f"the config is of {', '.join(architectures) or kind}, which is no decoder that generates text: it keeps no keys and "
            "values between steps, so there is nothing to plan"
        )
    if config.get("is_encoder_decoder"):
        raise ValueError("the config is of an encoder-decoder; its cross attention is not planned")


def language_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The nested configuration of the language model, or the whole; with the outer dtype where it has none of its own."""
    part, dtype = config, None
    path = "the config"
    while True:
        check_generates(part)
        dtype = next((own for own in (part.get("dtype"), part.get("torch_dtype"), dtype) if own is not None), None)
        key = next((key for key in NESTED if part.get(key) is not None), None)
        if key is None:
            break
        path = f"{path}'s {key}"
        if not isinstance(part[key], Mapping):
            raise ValueError(f"{path} is {shown(part[key])}; it must be an object")
        part = part[key]
    return dict(part) | {"dtype": str("bfloat16" if dtype is None else dtype).removeprefix("torch.")}


def check_numbers(config: Mapping[str, Any]) -> None:
    """Raises ValueError for a number of the language model that is none or out of range, and for a config that is nobody's."""
    text = language_part(config)
    kind = text.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise ValueError(
            f"the config's model_type is {shown(kind)}; without it nobody knows what it describes. It must be the config.json of a "
            "decoder model"
        )
    for names, most in (
        (LAYERS, MOST_LAYERS),
        (HEADS + KV_HEADS + HEAD_DIMS, MOST_HEADS),
        (WIDTH, MOST_WIDTH),
        (LENGTHS, MOST_TOKENS),
    ):
        for name in names:
            optional_number(text, name, most, 0 if name in HEAD_DIMS else 1)
    optional_number(text, "sliding_window", MOST_TOKENS, 0)
    for key, value in text.items():
        if not NUMERIC.search(key) or value == "auto":
            continue
        flag = value is True and key.startswith(("num_", "n_"))
        if isinstance(value, str) or flag or (isinstance(value, int | float) and value < -1):
            raise ValueError(f"the config's {key} is {shown(value)}; it must be a number of 0 or more")


def fill_in(text: dict[str, Any]) -> None:
    """Class defaults for a config that was read as a file. Raises ValueError for a class that is not known."""
    kind = text.get("model_type")
    if not isinstance(kind, str) or kind not in CLASS_DEFAULTS:
        raise ValueError(
            f"the config's model_type is {shown(kind)}, which cannot be read without the class that fills in its defaults; install "
            "transformers beside tq-backend, or vLLM"
        )
    for key, value in CLASS_DEFAULTS[kind].items():
        text.setdefault(key, value)


def kv_heads(text: Mapping[str, Any], heads: int) -> int:
    """As ModelConfig.get_total_num_kv_heads of vLLM 0.32 counts them."""
    kind = text.get("model_type")
    if kind in FALCONS and text.get("multi_query") and not text.get("new_decoder_architecture"):
        return 1
    if kind == "chatglm" and not text.get("multi_query_attention"):
        return heads
    if kind == "dbrx" and isinstance(text.get("attn_config"), Mapping):
        return optional_number(text["attn_config"], "kv_n_heads", MOST_HEADS) or heads
    return named(text, KV_HEADS, MOST_HEADS) or heads


def check_value_width(text: Mapping[str, Any], keys: int) -> None:
    if text.get("kv_lora_rank") is not None:
        return
    for key in ("v_head_dim", "kv_channels"):
        if (optional_number(text, key, MOST_HEADS) or keys) != keys:
            raise ValueError(
                f"the config's {key} is {text[key]} and its head_dim {keys}: values of another width than keys. The engine's code of "
                "such models (MiMo V2, OpenPangu) chooses an attention backend of its own, which these formats do not serve"
            )


def head_dim(text: Mapping[str, Any], heads: int) -> int:
    own = text.get("head_dim") or text.get("hidden_size_per_head")  # some classes write 0 for "not given"
    if own is not None and own != 0:
        found = number({"head_dim": own}, "head_dim", MOST_HEADS)
    else:
        width = named(text, WIDTH, MOST_WIDTH)
        if width is None or width < heads:
            raise ValueError(f"the config has no head_dim, and its hidden_size is {shown(width)} for {heads} heads")
        found = width // heads
    check_value_width(text, found)
    return found


def rope_parameters(text: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The scaling of positions, which is one for the model or one for each type of layer."""
    whole = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(whole, Mapping):
        raise ValueError(f"the config's rope_parameters is {shown(whole)}; it must be an object")
    return [whole, *(part for part in whole.values() if isinstance(part, Mapping))]


def model_length(text: Mapping[str, Any]) -> int | None:
    """As _get_and_verify_max_len of vLLM 0.32 derives it; None if no key gives one."""
    found = min((number(text, key, MOST_TOKENS) for key in LENGTHS if text.get(key) is not None), default=None)
    if text.get("model_max_length"):
        found = number(text, "model_max_length", MOST_TOKENS)
    if found is None or "gemma3" in str(text.get("model_type")):  # whose length is scaled already
        return found
    for rope in rope_parameters(text):
        kind = rope.get("rope_type") or rope.get("type")
        if kind == "longrope" and text.get("original_max_position_embeddings") is not None:
            return number(text, "original_max_position_embeddings", MOST_TOKENS)
        if kind in SCALED_BY_FACTOR and (factor := rope.get("factor")) is not None:
            if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor < 2**16:
                raise ValueError(f"the config's rope factor is {shown(factor)}; it must be a number above 0")
            return number({"length": int(found * factor)}, "length", MOST_TOKENS)
    return found


def check_keys(text: Mapping[str, Any]) -> None:
    """Raises ValueError for a key that is set, is not read here, and could change what a layer keeps."""
    listed = any(text.get(key) is not None for key in TYPE_LISTS)
    strange = sorted(
        key
        for key, value in text.items()
        if value
        and key not in READ
        and OF_ONE_TYPE.get(key) != text.get("model_type")
        and ((WEIGHTY.search(key) and not HARMLESS.search(key) and not (listed and STATE_KEYS.search(key)))
             or (not listed and STATE_KEYS.search(key)))
    )  # fmt: skip
    if strange:
        raise ValueError(
            f"the config is of a {text.get('model_type') or 'model'} with {', '.join(strange[:4])}, which this version does not read and "
            "which could change its cache; so there is no plan"
        )


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of a config with one name for each fact. Raises ValueError with a sentence for what is no
    decoder, has another cache than keys and values, or cannot be read for certain."""
    text = language_part(config)
    if not all(isinstance(key, str) for key in text):
        raise ValueError("the config has keys that are not text")
    if text.get("kv_lora_rank") is not None:
        raise ValueError(
            "the config describes MLA attention, whose cache is not keys and values; these formats do not serve it, use "
            "--kv-cache-dtype auto or fp8"
        )
    if text.get("head_dim"):
        check_value_width(text, number(text, "head_dim", MOST_HEADS))
    if not isinstance(config, FilledIn):
        fill_in(text)
    if text["dtype"] not in DTYPE_BYTES:
        raise ValueError(f"the config's dtype is {shown(text['dtype'])}; it must be one of {', '.join(DTYPE_BYTES)}")
    blocks = text.get("hybrid_override_pattern") or text.get("layers_block_type")
    if isinstance(blocks, str | list) and all(text.get(name) is None for name in LAYERS):
        text["num_hidden_layers"] = len(blocks)  # the newer files give no count beside the list
    for name, names, most in (("num_hidden_layers", LAYERS, MOST_LAYERS), ("num_attention_heads", HEADS, MOST_HEADS)):
        text[name] = named(text, names, most)
        if text[name] is None:
            raise ValueError(f"the config has no {name}; it must be the config.json of a decoder model")
    check_keys(text)
    heads = text["num_attention_heads"]
    causal = text.get("use_bidirectional_attention")  # Gemma 3 and 4 write "vision": images only
    if text.get("is_causal") is False or (causal and causal != "vision"):
        raise ValueError("the config describes attention in both directions, as an encoder has it; that is not planned")
    return text | {
        "head_dim": head_dim(text, heads),
        "num_key_value_heads": kv_heads(text, heads),
        "max_position_embeddings": model_length(text),
        "sliding_window": optional_number(text, "sliding_window", MOST_TOKENS, 0) or None,
    }
