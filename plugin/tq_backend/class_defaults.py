"""What a config.json may leave out, because its class fills it in: for reading one where transformers is not installed. A type
that is not here is not read by hand.

Where a class takes as many KV heads as query heads, or hidden_size / num_attention_heads for head_dim, there is no entry.
tests/python/test_config_readers.py compares every row with transformers 5.19 or vLLM 0.32.
"""

from __future__ import annotations

from typing import Any

# fmt: off
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    # Of vLLM, or of the model's own repository
    "chatglm": {"num_layers": 28, "num_attention_heads": 32, "hidden_size": 4096, "seq_length": 2048, "multi_query_attention": False, "multi_query_group_num": 1},
    "nemotron-nas": {},
    "step3_text": {"num_hidden_layers": 61, "num_attention_heads": 64, "num_attention_groups": 1, "head_dim": 256, "hidden_size": 7168, "max_seq_len": 65536},
    # Of transformers
    "bloom": {"n_layer": 2, "n_head": 8, "hidden_size": 64},
    "cohere": {"num_hidden_layers": 40, "num_attention_heads": 64, "hidden_size": 8192, "max_position_embeddings": 8192},
    "cohere2": {"num_hidden_layers": 40, "num_attention_heads": 64, "hidden_size": 8192, "sliding_window": 4096, "max_position_embeddings": 8192},
    "ernie4_5": {"num_hidden_layers": 18, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128, "hidden_size": 1024, "max_position_embeddings": 131072},
    "ernie4_5_moe": {"num_hidden_layers": 28, "num_attention_heads": 20, "num_key_value_heads": 4, "hidden_size": 2560, "max_position_embeddings": 131072},
    "exaone4": {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_size": 4096, "sliding_window": 4096, "max_position_embeddings": 2048},
    "falcon": {"num_hidden_layers": 32, "num_attention_heads": 71, "multi_query": True, "new_decoder_architecture": False, "hidden_size": 4544, "max_position_embeddings": 2048},
    "gemma": {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "hidden_size": 3072, "max_position_embeddings": 8192},
    "gemma2": {"num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_size": 2304, "sliding_window": 4096, "max_position_embeddings": 8192},
    "gemma3_text": {"num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_size": 2304, "sliding_window": 4096, "max_position_embeddings": 131072},
    "gemma3n_text": {"num_hidden_layers": 35, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "hidden_size": 2048, "sliding_window": 512, "num_kv_shared_layers": 15, "max_position_embeddings": 32768},
    "gemma4_text": {"num_hidden_layers": 30, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_size": 2304, "sliding_window": 512, "num_kv_shared_layers": 0, "max_position_embeddings": 131072},
    "glm4": {"num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "hidden_size": 4096, "max_position_embeddings": 131072},
    "glm4_moe": {"num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8, "hidden_size": 4096, "max_position_embeddings": 131072},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024},
    "gpt_neox": {"num_hidden_layers": 44, "num_attention_heads": 64, "hidden_size": 6144, "max_position_embeddings": 2048},
    "gpt_oss": {"num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "hidden_size": 2880, "sliding_window": 128, "max_position_embeddings": 131072},
    "gptj": {"n_layer": 28, "n_head": 16, "n_embd": 4096, "n_positions": 2048},
    "granite": {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096, "max_position_embeddings": 2048},
    "granitemoe": {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096, "max_position_embeddings": 2048},
    "granitemoehybrid": {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096, "max_position_embeddings": 2048, "mamba_d_state": 256, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 128, "mamba_n_groups": 1},
    "jamba": {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096, "max_position_embeddings": 262144, "attn_layer_period": 8, "attn_layer_offset": 4, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2},
    "llama": {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096, "max_position_embeddings": 2048},
    "minimax_m2": {"num_hidden_layers": 62, "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "hidden_size": 3072, "max_position_embeddings": 196608},
    "ministral3": {"num_hidden_layers": 34, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "hidden_size": 4096, "max_position_embeddings": 262144},
    "mistral": {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096, "sliding_window": 4096, "max_position_embeddings": 131072},
    "mixtral": {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096, "max_position_embeddings": 131072},
    "nemotron": {"num_hidden_layers": 32, "num_attention_heads": 48, "hidden_size": 6144, "max_position_embeddings": 4096},
    "nemotron_h": {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "hidden_size": 4096, "max_position_embeddings": 4096, "mamba_num_heads": 128, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4, "mamba_ssm_cache_dtype": "float32"},
    "olmo": {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096, "max_position_embeddings": 2048},
    "olmo2": {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096, "max_position_embeddings": 2048},
    "olmo3": {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096, "sliding_window": 4096, "max_position_embeddings": 2048},
    "opt": {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768, "max_position_embeddings": 2048},
    "phi3": {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 3072, "max_position_embeddings": 4096},
    "phimoe": {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096, "max_position_embeddings": 131072},
    "qwen2": {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_size": 4096, "use_sliding_window": False, "max_window_layers": 28, "max_position_embeddings": 32768},
    "qwen2_moe": {"num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "hidden_size": 2048, "sliding_window": 0, "use_sliding_window": False, "max_window_layers": 28, "max_position_embeddings": 32768},
    "qwen2_vl_text": {"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 8192, "use_sliding_window": False, "max_window_layers": 80, "max_position_embeddings": 32768},
    "qwen2_5_vl_text": {"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 8192, "use_sliding_window": False, "max_window_layers": 80, "max_position_embeddings": 32768},
    "qwen3": {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "hidden_size": 4096, "use_sliding_window": False, "max_window_layers": 28, "max_position_embeddings": 32768},
    "qwen3_moe": {"num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 4, "hidden_size": 2048, "use_sliding_window": False, "max_position_embeddings": 32768},
    "qwen3_next": {"num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "hidden_size": 2048, "max_position_embeddings": 32768, "linear_num_value_heads": 32, "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4},
    "qwen3_5_text": {"num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "hidden_size": 4096, "max_position_embeddings": 32768, "linear_num_value_heads": 32, "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4},
    "qwen3_5_moe_text": {"num_hidden_layers": 40, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "hidden_size": 2048, "max_position_embeddings": 32768, "linear_num_value_heads": 32, "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4},
    "qwen3_omni_moe_text": {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 2048, "max_position_embeddings": 32768},
    "qwen3_vl_text": {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "hidden_size": 4096, "max_position_embeddings": 128000},
    "qwen3_vl_moe_text": {"num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "hidden_size": 2048, "max_position_embeddings": 128000},
    "stablelm": {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_size": 2560, "max_position_embeddings": 4096},
    "starcoder2": {"num_hidden_layers": 30, "num_attention_heads": 24, "num_key_value_heads": 2, "hidden_size": 3072, "max_position_embeddings": 4096},
}
