"""vLLM's other 4-bit caches: what a key or a value is when it comes back out of them, by vLLM's own definitions.

Their kernels run on some GPUs only, so `tq eval` simulates them as it does fp8 (simulated.py). All of a rotation is here: what is
stored is rotated, rounded and rotated back. Queries are not rounded, as UltraQuant's kernel rounds them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

E2M1_MIDPOINTS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
BLOCK, LARGEST_E4M3 = 16, 448.0


def int4_per_token_head(x: torch.Tensor) -> torch.Tensor:
    """vllm/v1/attention/ops/int4_per_token_head.py: a randomized Hadamard transform in the model's dtype, then 16 even steps from the
    smallest to the largest element of the vector, with a zero point among them."""
    from vllm.utils.math_utils import largest_power_of_2_divisor
    from vllm.v1.attention.ops.int4_per_token_head import single_rht

    turned = single_rht(x.float()).to(x.dtype).float()
    low, high = turned.amin(-1, keepdim=True), turned.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-6)
    zero = (-low / scale).round().clamp(0, 15)
    codes = (turned / scale + zero).round().clamp(0, 15)
    back = single_rht((codes - zero) * scale, inverse=True) / largest_power_of_2_divisor(x.shape[-1])
    return back.to(x.dtype)


def ultraquant_4bit(x: torch.Tensor, rotate: bool) -> torch.Tensor:
    """vllm/v1/attention/ops/ultraquant/reference.py, which is its kernels' reference: FP4 with a power of two for each 32 elements. Keys
    are rotated."""
    from vllm.v1.attention.ops.ultraquant.reference import hadamard_matrix, ultraquant_encode_decode

    rounded = ultraquant_encode_decode(x, rotate=rotate)
    return (rounded @ hadamard_matrix(x.shape[-1], x.device) if rotate else rounded).to(x.dtype)


def nvfp4(x: torch.Tensor) -> torch.Tensor:
    """FP4 with an e4m3 scale for each 16 elements, the largest being 6, and a global scale of 1.0, vLLM's default."""
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    scale = (largest / 6).clamp(max=LARGEST_E4M3).to(torch.float8_e4m3fn).float()
    sized = torch.where(scale > 0, blocks / scale, 0.0)
    rounded = E2M1[torch.bucketize(sized.abs().contiguous(), E2M1_MIDPOINTS)].copysign(sized)
    return (rounded * scale).flatten(-2).to(x.dtype)


# What keys become, what values become, and the bytes of a vector of so many elements.
Peer = tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor], Callable[[int], int]]
PEERS: dict[str, Peer] = {
    "int4_per_token_head": (int4_per_token_head, int4_per_token_head, lambda dim: dim // 2 + 4),
    "nvfp4": (nvfp4, nvfp4, lambda dim: dim // 2 + dim // BLOCK),
    "ultraquant_4bit": (
        lambda key: ultraquant_4bit(key, True), lambda value: ultraquant_4bit(value, False), lambda dim: dim // 2 + dim // 32
    ),
}  # fmt: skip
