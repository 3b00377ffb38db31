"""Checkpoints of real architectures with few, small layers and random weights, made from their public configuration classes.

Weights are large (standard deviation 0.2) and windows short, so that attention decides the output: one key more or less moves log
probabilities by far more than the tolerance of a comparison.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

VOCABULARY = 256
SEED = 20261125
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
}
WINDOW = 40
PER_LAYER_INPUTS = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16}
# Layers 4 to 7 read the caches of 2 (window) and 3 (full).
SHARING = {
    "num_hidden_layers": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 4,
    "num_kv_shared_layers": 4,
    "sliding_window": WINDOW,
}
LINEAR_ATTENTION = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    # vLLM's CPU kernel takes no smaller one.
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# name: (configuration class, its arguments)
WINDOWED = {  # one model whose class takes no window from the user, and as its class makes it with one
    "qwen3": ("Qwen3Config", BASE),
    "qwen3_window": (
        "Qwen3Config", BASE | {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 0}
    ),
}  # fmt: skip
NOT_COMPRESSED = {
    # vLLM's Falcon gives its layers no cache configuration.
    "falcon": (
        "FalconConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "multi_query": True,
            "bias": False,
        },
    ),
    # vLLM skips the first and last two layers.
    "llama_4_layers": ("LlamaConfig", BASE | {"num_hidden_layers": 4}),
}
# With a bias in the keys: of the last head, by layer, and a small one everywhere else.
KEY_BIAS = {0: 300.0, 3: 100.0, 5: 60.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 256}
WIDE = BASE | {"hidden_size": 128}  # vLLM takes a head_dim from it for some
BIASED = {
    "qwen2": ("Qwen2Config", WIDE),
    "qwen2_yarn": ("Qwen2Config", WIDE | {"rope_parameters": YARN}),
    # Half of a key turns, in interleaved pairs.
    "glm4": ("Glm4Config", BASE | {"attention_bias": True, "partial_rotary_factor": 0.5, "pad_token_id": None}),
    # A quarter of a key turns.
    "stablelm": ("StableLmConfig", WIDE | {"use_qkv_bias": True, "partial_rotary_factor": 0.25}),
    # No key turns; one projection is stored for queries, keys and values.
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 6, "n_head": 2, "n_positions": 1024, "initializer_range": 0.2},
    ),
    # Keys are normalized after the bias was added.
    "qwen3_bias": ("Qwen3Config", BASE | {"attention_bias": True}),
}  # fmt: skip
# Without keys and values to compress: as far as their configuration goes.
ENCODERS = {"bert": ("BertConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_attention_heads": 2})}
ARCHITECTURES = {
    "llama": ("LlamaConfig", BASE),
    "gemma2": (
        "Gemma2Config",
        BASE | {"sliding_window": WINDOW, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 32},
    ),
    "gemma3": ("Gemma3TextConfig", BASE | {"sliding_window": WINDOW, "query_pre_attn_scalar": 32}),
    "gemma3n": (
        "Gemma3nTextConfig",
        BASE
        | PER_LAYER_INPUTS
        | SHARING
        | {"altup_num_inputs": 2, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 8}
        # A padding token's embedding is zero, of which Gemma 3n's magnitude ratio makes NaN: no token is one.
        | {"pad_token_id": None},
    ),
    "gemma4": ("Gemma4TextConfig", BASE | PER_LAYER_INPUTS | SHARING | {"global_head_dim": 64}),
    "gpt_oss": (
        "GptOssConfig",
        BASE | {"num_hidden_layers": 4, "sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        BASE | LINEAR_ATTENTION | EXPERTS | {"shared_expert_intermediate_size": 32},
    ),
    "bloom": (
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 128, "n_layer": 4, "n_head": 4, "initializer_range": 0.2},
    ),
    # Three of four layers attend in chunks, which no page may cross.
    "llama4": (
        "Llama4TextConfig",
        BASE
        | {
            "num_hidden_layers": 8,
            "intermediate_size_mlp": 128,
            "attention_chunk_size": 64,
            "no_rope_layers": [1, 1, 1, 0] * 2,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
        },
    ),
    # Attention and Mamba in every layer, and no list of layer types.
    "falcon_h1": (
        "FalconH1Config",
        BASE
        | {
            "num_hidden_layers": 4,
            "mamba_d_ssm": 128,
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_n_groups": 1,
            "mamba_d_state": 16,
            "mamba_chunk_size": 64,
        },
    ),
    # 48 is no power of two.
    "head_dim_48": ("LlamaConfig", BASE | {"head_dim": 48}),
}


def key_bias(layer: int, size: int) -> torch.Tensor:
    """Mostly in the slowest rotary pairs, as Qwen2.5 has it."""
    heads, dim = BASE["num_key_value_heads"], size // BASE["num_key_value_heads"]
    bias = torch.randn(heads, dim, generator=torch.Generator().manual_seed(SEED + layer))
    bias *= torch.linspace(0.0, 1.0, dim // 2).repeat(2) ** 8
    norms = torch.tensor([*[2.0] * (heads - 1), KEY_BIAS.get(layer, 4.0)])
    return (bias * (norms / bias.norm(dim=-1))[:, None]).flatten()


def make(name: str, folder: Path) -> Path:
    """Writes the checkpoint to folder / name; the weights are the same each time."""
    config_class, arguments = (ARCHITECTURES | WINDOWED | NOT_COMPRESSED | BIASED)[name]
    torch.manual_seed(SEED)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config_class)(**arguments), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("sinks"):  # zeros would be no sinks
                parameter.copy_(torch.linspace(-1.0, 2.0, parameter.numel()))
            if name in BIASED and parameter_name.endswith(("k_proj.bias", "c_attn.bias")):
                keys = parameter.chunk(3)[1] if "c_attn" in parameter_name else parameter
                keys.copy_(key_bias(int(parameter_name.split(".")[2]), keys.numel()))
    model.save_pretrained(folder / name)
    return folder / name


def make_config(name: str, architecture: str, folder: Path) -> Path:
    """Writes config.json alone: all that the making of an engine's configuration reads."""
    config_class, arguments = (ARCHITECTURES | ENCODERS)[name]
    getattr(transformers, config_class)(**arguments, architectures=[architecture]).save_pretrained(folder / name)
    return folder / name


IMAGE_SIZE, IMAGE_TOKENS = 56, 16
WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"]
START_OF_IMAGE, END_OF_IMAGE, IMAGE_TOKEN = 4, 5, 6
# The processor looks for line breaks beside an image among the tokens.
WORDS += ["\n" * count for count in range(1, 5)]


def make_vision(folder: Path) -> Path:
    """Gemma 3 with a vision tower, and a processor with a vocabulary of its own."""
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    words = WORDS + [f"w{i}" for i in range(len(WORDS), VOCABULARY)]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    processor = transformers.Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            **{f"{word[1:-1]}_token": word for word in WORDS[:4]},
            extra_special_tokens={"boi_token": WORDS[4], "eoi_token": WORDS[5], "image_token": WORDS[6]},
        ),
        image_seq_length=IMAGE_TOKENS,
    )
    _, arguments = ARCHITECTURES["gemma3"]
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**arguments).to_dict(),
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": IMAGE_SIZE, "patch_size": 7, "initializer_range": 0.2,
        },
        mm_tokens_per_image=IMAGE_TOKENS,
        boi_token_index=START_OF_IMAGE,
        eoi_token_index=END_OF_IMAGE,
        image_token_index=IMAGE_TOKEN,
    )  # fmt: skip
    torch.manual_seed(SEED)
    made = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # zeros would make all images alike
        weight = made.model.multi_modal_projector.mm_input_projection_weight
        weight.copy_(torch.randn(weight.shape) * 0.2)
    processor.save_pretrained(folder)
    made.save_pretrained(folder)
    # vLLM reads the names of the published checkpoints.
    weights = load_file(folder / "model.safetensors")
    renamed = {
        k if "vision_model" in k else k.replace("vision_tower.", "vision_tower.vision_model."): w
        for k, w in weights.items()
    }
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (length,), generator=generator).tolist()
