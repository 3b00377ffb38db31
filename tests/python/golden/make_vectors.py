"""Writes vllm_store_d<head_dim>.npz beside this file: what vLLM's own TurboQuant store kernel makes of seeded keys and values.

    python tests/python/golden/make_vectors.py [OUT_DIR]      on a machine with an NVIDIA GPU (sm_89 or later), vLLM 0.32 or 0.33

Arrays: key, value [tokens, heads, head_dim] as bf16 bits; slot_mapping [tokens]; rotation [head_dim, head_dim]; and per preset
.cache [blocks, page, heads, slot bytes], .centroids, .midpoints.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
from vllm.model_executor.layers.quantization.turboquant.config import TQ_PRESETS, TurboQuantConfig
from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store

TOKENS, HEADS, PAGE = 160, 2, 16


def hadamard(dim: int) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(dim)


def bits(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.int16).cpu().numpy().view(np.uint16)


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for dim in (64, 128, 256):
        torch.manual_seed(dim)
        key, value = (torch.randn(TOKENS, HEADS, dim).to(torch.bfloat16).cuda() for _ in range(2))
        slots = torch.randperm(TOKENS).cuda()
        rotation = hadamard(dim).cuda()
        arrays = {
            "key": bits(key),
            "value": bits(value),
            "slot_mapping": slots.cpu().numpy(),
            "rotation": rotation.cpu().numpy(),
        }
        for preset in TQ_PRESETS:
            config = TurboQuantConfig.from_cache_dtype(preset, dim)
            centroids = get_centroids(dim, config.centroid_bits).float()
            midpoints = (centroids[:-1] + centroids[1:]) / 2
            cache = torch.zeros(TOKENS // PAGE, PAGE, HEADS, config.slot_size_aligned, dtype=torch.uint8).cuda()
            triton_turboquant_store(
                key, value, cache, slots, rotation, midpoints.cuda(), mse_bits=config.key_mse_bits,
                key_packed_size=config.key_packed_size, value_quant_bits=config.effective_value_quant_bits,
                key_fp8=config.key_fp8,
            )  # fmt: skip
            arrays |= {f"{preset}.cache": cache.cpu().numpy(), f"{preset}.centroids": centroids.numpy()}
            arrays[f"{preset}.midpoints"] = midpoints.numpy()
        np.savez_compressed(out / f"vllm_store_d{dim}.npz", **arrays)
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
