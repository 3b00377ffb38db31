"""Gemma 3 from GGUF to a Hugging Face folder that vLLM serves."""

from __future__ import annotations

from pathlib import Path

from gguf_file import CONTROL, NORMAL, USER_DEFINED, GgufFile, write_folder
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

LAYER_PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHERS = {"token_embd": "embed_tokens", "output_norm": "norm"}
FULL_ATTENTION_EVERY = 6
BOS, EOS, PAD = 2, 1, 0
SPACE = "▁"


def name_of(tensor: str) -> str:
    stem = tensor.removesuffix(".weight")
    if stem in OTHERS:
        return f"model.{OTHERS[stem]}.weight"
    _, number, part = stem.split(".")
    return f"model.layers.{number}.{LAYER_PARTS[part]}.weight"


def config_of(file: GgufFile) -> dict:
    layers, head_dim = file.of_model("block_count"), file.of_model("attention.key_length")
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "dtype": "bfloat16",
        "vocab_size": len(file.of_tokenizer("tokens")),
        "hidden_size": file.of_model("embedding_length"),
        "intermediate_size": file.of_model("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": file.of_model("attention.head_count"),
        "num_key_value_heads": file.of_model("attention.head_count_kv"),
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
        "max_position_embeddings": file.of_model("context_length"),
        "rms_norm_eps": 1e-6,
        "rope_theta": file.of_model("rope.freq_base"),
        "rope_local_base_freq": 10000.0,
        "sliding_window": file.of_model("attention.sliding_window"),
        "layer_types": [
            "sliding_attention" if (i + 1) % FULL_ATTENTION_EVERY else "full_attention" for i in range(layers)
        ],
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }


def merges_of(pieces: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """GGUF keeps scores of pieces and no merges: a piece may come from each of its splits into two pieces, and pieces of better
    score are merged first."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    found = []
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        if kind == NORMAL:
            splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
            found += [(-score, ids[a], ids[b], a, b) for a, b in splits if a in ids and b in ids]
    return [(a, b) for *_, a, b in sorted(found)]


def tokenizer_of(file: GgufFile) -> Tokenizer:
    pieces, scores, types = (file.of_tokenizer(name) for name in ("tokens", "scores", "token_type"))
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges_of(pieces, scores, types), byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    kinds = list(zip(pieces, types, strict=True))
    tokenizer.add_tokens(
        [AddedToken(piece, normalized=False) for piece, kind in kinds if kind == USER_DEFINED and SPACE not in piece]
    )
    tokenizer.add_special_tokens(
        [AddedToken(piece, special=True, normalized=False) for piece, kind in kinds if kind == CONTROL]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", BOS)]
    )
    if tokenizer.get_vocab_size() != len(pieces):
        raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens; the file has {len(pieces)}")
    return tokenizer


def convert(source: Path, folder: Path) -> None:
    file = GgufFile(source, "gemma3")
    # llama.cpp stores the weights of norms with the 1 that Hugging Face's code adds.
    weights = {name_of(n): w - 1 if n.endswith("norm.weight") else w for n, w in file.tensors()}
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write_folder(folder, weights, config_of(file), tokenizer_of(file), names | {"add_bos_token": True})
