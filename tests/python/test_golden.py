"""vLLM's own pages (tests/python/golden) decode to what our codec gives on the same input.

vLLM's slots are taken apart here in numpy, independently of our code: [key codes | fp16 norm | value codes | fp16 scale | fp16 min].
"""

from pathlib import Path

import numpy as np
import pytest
from tq_backend._library import native

GOLDEN = Path(__file__).parent / "golden"
PRESETS = {  # key bits (8: e4m3), value bits
    "turboquant_k8v4": (8, 4),
    "turboquant_4bit_nc": (4, 4),
    "turboquant_k3v4_nc": (3, 4),
    "turboquant_3bit_nc": (3, 3),
}


def bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def unpack(data: np.ndarray, bits: int, dim: int) -> np.ndarray:
    """Little-endian bit string: 4 bits, even dimension low; 3 bits, eight codes in 24 bits."""
    all_bits = np.unpackbits(data, axis=-1, bitorder="little")[..., : dim * bits].reshape(*data.shape[:-1], dim, bits)
    return (all_bits * (1 << np.arange(bits))).sum(-1)


def fp16(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).view(np.float16)[..., 0].astype(np.float64)


def e4m3(data: np.ndarray) -> np.ndarray:
    sign = np.where(data & 0x80, -1.0, 1.0)
    exponent, mantissa = (data >> 3) & 15, data & 7
    return sign * np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent.astype(int) - 10))


@pytest.fixture(scope="module", params=[64, 128, 256])
def golden(request):
    return request.param, np.load(GOLDEN / f"vllm_store_d{request.param}.npz")


def slots_of(golden: np.lib.npyio.NpzFile, preset: str) -> np.ndarray:
    """[tokens, heads, slot bytes] in the order of key and value."""
    cache = golden[f"{preset}.cache"]
    return cache.reshape(-1, *cache.shape[2:])[golden["slot_mapping"]]


@pytest.mark.parametrize("preset", PRESETS)
def test_values(golden, preset):
    dim, data = golden
    value_bits = PRESETS[preset][1]
    slots = slots_of(data, preset)
    packed = slots[..., -(dim * value_bits // 8 + 4) :]
    codes = unpack(packed[..., :-4], value_bits, dim)
    want = codes * fp16(packed[..., -4:-2])[..., None] + fp16(packed[..., -2:])[..., None]
    value = bf16(data["value"])
    ours = native().fake_quantize(preset, "value", value.reshape(-1, dim)).reshape(value.shape)
    # The same arithmetic, so equal to float32 rounding, but for ties: bf16 values often lie exactly between two codes, and the
    # GPU's division is not correctly rounded.
    low, high = value.min(-1, keepdims=True), value.max(-1, keepdims=True)
    position = (value - low).astype(np.float64) / ((high - low) / np.float32(2**value_bits - 1))
    tie = np.abs(position % 1 - 0.5) < 1e-5
    assert tie.mean() < 0.01
    assert (np.abs(ours - want)[~tie] <= 1e-5).all()
    step = fp16(packed[..., -4:-2])[..., None]
    assert (np.abs(ours - want) <= step * 1.001 + 1e-5).all()


def test_fp8_keys(golden):
    dim, data = golden
    slots = slots_of(data, "turboquant_k8v4")
    key = bf16(data["key"])
    ours = native().fake_quantize("turboquant_k8v4", "key", key.reshape(-1, dim)).reshape(key.shape)
    assert (ours == e4m3(slots[..., :dim])).all()


@pytest.mark.parametrize("preset", [name for name, bits in PRESETS.items() if bits[0] < 8])
def test_lloyd_max_keys(golden, preset):
    """Our table is vLLM's rounded to a 7-bit grid, so a decoded key differs by the rounding of its centroids, and where a code
    lies between the two tables' thresholds, by one level."""
    dim, data = golden
    bits = PRESETS[preset][0]
    slots = slots_of(data, preset)
    codes = unpack(slots[..., : dim * bits // 8], bits, dim)
    norm = fp16(slots[..., dim * bits // 8 : dim * bits // 8 + 2])
    centroids = data[f"{preset}.centroids"].astype(np.float64)
    direction = centroids[codes]
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)  # vLLM's norm correction
    want = (norm[..., None] * direction) @ data["rotation"].astype(np.float64)

    key = bf16(data["key"])
    ours = native().fake_quantize(preset, "key", key.reshape(-1, dim)).reshape(key.shape).astype(np.float64)
    book = native().codebook(preset, "key", dim)
    table = np.array(book["levels"]) / np.sqrt(dim)
    shift = np.abs(table - centroids).max() * np.sqrt(dim)  # in units of the coordinate's standard deviation
    near = np.diff(table).max() * np.sqrt(dim)
    # A vector of dim coordinates, each off by at most `shift` (and a few by one level), relative to its norm sqrt(dim).
    between = np.abs(np.array(book["midpoints"]) / np.sqrt(dim) - data[f"{preset}.midpoints"]).max() * np.sqrt(dim)
    moved = 2 * between * 2**bits / np.sqrt(2 * np.pi)  # share of codes between the thresholds, at most
    bound = np.sqrt(shift**2 + (moved + 4 * np.sqrt(moved / dim)) * near**2) + 1e-3
    error = np.linalg.norm(ours - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert error.max() < bound
    # And both are equally near to what was stored.
    theirs_error = np.linalg.norm(want - key, axis=-1).mean()
    ours_error = np.linalg.norm(ours - key, axis=-1).mean()
    assert abs(ours_error / theirs_error - 1) < 0.02
