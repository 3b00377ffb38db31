"""Qwen2.5 from GGUF to a Hugging Face folder that vLLM serves."""

from __future__ import annotations

from pathlib import Path

from gguf_file import CONTROL, NORMAL, USER_DEFINED, GgufFile, write_folder
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHERS = {"token_embd": "embed_tokens", "output_norm": "norm"}
END_OF_TEXT, END_OF_TURN = 151643, 151645
# Qwen2's own, from its tokenizer.json.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def name_of(tensor: str) -> str:
    stem, _, kind = tensor.rpartition(".")  # kind: weight or bias
    if stem in OTHERS:
        return f"model.{OTHERS[stem]}.{kind}"
    _, number, part = stem.split(".")
    return f"model.layers.{number}.{LAYER_PARTS[part]}.{kind}"


def weights_of(file: GgufFile) -> dict:
    """Embedding and output are one matrix in the original. Where a file has both, the output is the finer copy."""
    weights = {}
    output = None
    for name, weight in file.tensors():
        if name == "output.weight":
            output = weight
        else:
            weights[name_of(name)] = weight
    if output is not None:
        weights["model.embed_tokens.weight"] = output
    return weights


def config_of(file: GgufFile, vocabulary: int) -> dict:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dtype": "bfloat16",
        "vocab_size": vocabulary,
        "hidden_size": file.of_model("embedding_length"),
        "intermediate_size": file.of_model("feed_forward_length"),
        "num_hidden_layers": file.of_model("block_count"),
        "num_attention_heads": file.of_model("attention.head_count"),
        "num_key_value_heads": file.of_model("attention.head_count_kv"),
        "max_position_embeddings": file.of_model("context_length"),
        "rms_norm_eps": file.of_model("attention.layer_norm_rms_epsilon"),
        "rope_theta": file.of_model("rope.freq_base"),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": [END_OF_TURN, END_OF_TEXT],
    }


def tokenizer_of(file: GgufFile) -> Tokenizer:
    pieces, types = file.of_tokenizer("tokens"), file.of_tokenizer("token_type")
    merges = [tuple(merge.split(" ")) for merge in file.of_tokenizer("merges")]
    vocabulary = {piece: i for i, piece in enumerate(pieces) if types[i] == NORMAL}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [i for i, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(pieces[i], special=types[i] == CONTROL, normalized=False) for i in added])
    for i in added:
        if tokenizer.token_to_id(pieces[i]) != i:
            raise ValueError(f"{pieces[i]!r} has the number {tokenizer.token_to_id(pieces[i])}; the file says {i}")
    return tokenizer


def convert(source: Path, folder: Path) -> None:
    file = GgufFile(source, "qwen2")
    weights = weights_of(file)
    config = config_of(file, len(weights["model.embed_tokens.weight"]))
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    write_folder(folder, weights, config, tokenizer_of(file), names)
