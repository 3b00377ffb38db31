"""docs/page_format.md is enough to read a page: a reader made from it alone, on pages that the library has written.

Nothing here comes from the source of the library. The tables of formats and of codebooks are read from the document.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tq_backend._library import native, torch_ops  # noqa: E402

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs/page_format.md").read_text()


def table(first_column: str) -> list[list[str]]:
    """Cells of the table of the document whose first column has this head."""
    rows = re.search(rf"^\| {re.escape(first_column)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", DOCUMENT, re.M)[1]
    return [[cell.strip() for cell in row.strip("|\n").split("|")] for row in rows.splitlines()]


FORMATS = {row[1]: (int(row[0], 16), row[2], int(row[3]), row[4], int(row[5])) for row in table("format id")}
CODEBOOKS = {int(row[0]): (np.float32(row[1]), np.array(row[2].split(), np.float64)) for row in table("code bits")}


def unpack(row: np.ndarray, bits: int, dims: int) -> np.ndarray:
    """The codes of a row, or its floats."""
    d = np.arange(dims)
    if bits == 32:
        return row.view("<f4")
    if bits == 8:
        return row
    if bits == 4:
        return row[d // 2] >> (4 * (d % 2)) & 15
    if bits == 5:
        low = row[d // 2] >> (4 * (d % 2)) & 15
        i, g = d % 8, d % 16 // 8
    else:
        low = row[d // 4] >> (2 * (d % 4)) & 3
        i, g = d % 16 // 2, d % 2
    p = 32 * (d // 32) + 4 * i + 2 * (d % 32 // 16) + g
    if dims // 16 % 2 == 1:
        p[-16:] = (32 * (d // 32) + 2 * i + g)[-16:]
    high = row[dims * (bits - 1) // 8 + p // 8] >> (p % 8) & 1
    return low + (high << (bits - 1))


def e4m3(code: np.ndarray) -> np.ndarray:
    sign, e, m = 1.0 - 2.0 * (code >> 7), (code >> 3 & 15).astype(int), (code & 7).astype(float)
    return sign * np.where(e == 0, m / 8 * 2.0**-6, (1 + m / 8) * 2.0 ** (e - 7))


@functools.cache
def signs(n: int) -> np.ndarray:
    return np.array([[(-1.0) ** bin(i & j).count("1") for j in range(n)] for i in range(n)])


def rotate(x: np.ndarray) -> np.ndarray:
    out, at = np.empty_like(x), 0
    for digit in reversed(range(10)):
        n = 1 << digit
        if not len(x) & n:
            continue
        out[at : at + n] = signs(n) @ x[at : at + n] / np.sqrt(n)
        at += n
    return out


def read(page: np.ndarray, name: str, h: int, t: int, head_dim: int, head_dim_v: int, block_size: int):
    """Key and value of token t and head h of a page."""
    _, key_code, key_bits, value_code, value_bits = FORMATS[name]
    key_row, value_row = head_dim * key_bits // 8, head_dim_v * value_bits // 8
    arrays = (key_code in ("lloyd_max", "integer")) + {"uniform": 2, "lloyd_max": 1, "float": 0}[value_code]
    slot = key_row + value_row + 2 * arrays
    start = (h * (block_size // 16) + t // 16) * 16 * slot
    atom = page[start : start + 16 * slot]
    t %= 16
    key = unpack(atom[t * key_row : (t + 1) * key_row], key_bits, head_dim)
    value = unpack(atom[16 * key_row + t * value_row :][:value_row], value_bits, head_dim_v)
    halves = (
        atom[16 * (key_row + value_row) :].view("<f2").astype(np.float64)
    )  # norms, scales, zeros, as far as they are there
    if key_code == "e4m3":
        key = e4m3(key)
    elif key_code == "lloyd_max":
        scale, level = CODEBOOKS[key_bits]
        key = rotate(halves[t] * level[key] / (scale * np.sqrt(head_dim)))
        halves = halves[16:]
    elif key_code == "integer":
        key = rotate(halves[t] * (key.astype(np.float64) - 128) / (32 * np.sqrt(head_dim)))
        halves = halves[16:]
    if value_code == "lloyd_max":
        scale, level = CODEBOOKS[value_bits]
        value = rotate(halves[t] * level[value] / (scale * np.sqrt(head_dim_v)))
    if value_code == "uniform":
        value = value * halves[t] + halves[16 + t]
    return key, value


SHAPES = [(64, 64), (80, 80), (128, 128), (256, 256), (16, 48), (112, 80), (192, 128)]  # 16, 48, 80, 112: a half unit
TOKENS, HEADS, BLOCK, BLOCKS = 40, 3, 32, 5


@pytest.fixture(scope="module", params=[(name, *shape) for name in FORMATS for shape in SHAPES], ids=str)
def written(request: pytest.FixtureRequest):
    """Format, head dimensions, keys and values, the pages with them, the slots, and what dequant_kv reads in them."""
    name, dim, dim_v = request.param
    generator = np.random.default_rng(dim * 1000 + dim_v)
    key = generator.standard_normal((TOKENS, HEADS, dim), np.float32) * 3
    value = generator.standard_normal((TOKENS, HEADS, dim_v), np.float32) + 1
    key[3], value[4], key[5, :, 0] = 0, 0.5, 1e4  # no length; all equal; an outlier
    format_id = FORMATS[name][0]
    assert native().format_by_name(name)["format_id"] == format_id
    slot = native().kv_cache_spec(name, HEADS, dim, dim_v)["slot_bytes"]
    pages = torch.full((BLOCKS, HEADS * BLOCK * slot), 0xA5, dtype=torch.uint8)
    blocks = [4, 1]
    slots = [blocks[t // BLOCK] * BLOCK + t % BLOCK for t in range(TOKENS)]
    torch_ops().store_kv(torch.from_numpy(key), torch.from_numpy(value), pages, torch.tensor(slots), format_id, BLOCK)
    key_out, value_out = torch.empty(TOKENS, HEADS, dim), torch.empty(TOKENS, HEADS, dim_v)
    numbers = [torch.tensor(x, dtype=torch.int32) for x in ([blocks], [0], [0, TOKENS])]
    torch_ops().dequant_kv(pages, *numbers, format_id, BLOCK, key_out, value_out, False)
    return name, key, value, pages.numpy(), slots, key_out.numpy(), value_out.numpy()


def test_a_reader_made_from_the_document_reads_what_the_library_stored(written):
    name, key, value, pages, slots, key_out, value_out = written
    dim, dim_v = key.shape[2], value.shape[2]
    quantized = native().fake_quantize
    keys_back = quantized(name, "key", key.reshape(-1, dim)).reshape(key.shape)
    values_back = quantized(name, "value", value.reshape(-1, dim_v)).reshape(value.shape)
    key_read, value_read = np.empty(key.shape), np.empty(value.shape)
    for t, slot in enumerate(slots):
        for h in range(HEADS):
            page = pages[slot // BLOCK]
            key_read[t, h], value_read[t, h] = read(page, name, h, slot % BLOCK, dim, dim_v, BLOCK)
    for ours, stored, codec in ((key_read, key_out, keys_back), (value_read, value_out, values_back)):
        # Floats, and a rotation adds up to 256 of them in eight steps.
        bound = np.maximum(5e-6 * np.abs(ours).max(axis=2, keepdims=True), 1e-12)
        assert (np.abs(stored - ours) <= bound).all()
        # Two sums of floats may put a code at a tie on either side, which moves its whole row once it is rotated back.
        assert (np.abs(codec - ours) > bound).any(axis=2).mean() <= 0.01


def test_the_codebooks_are_the_librarys():
    for name, (_, key_code, key_bits, value_code, value_bits) in FORMATS.items():
        for side, code, bits in (("key", key_code, key_bits), ("value", value_code, value_bits)):
            if code == "lloyd_max":
                scale, levels = CODEBOOKS[bits]
                for dim in (64, 80):
                    assert native().codebook(name, side, dim)["levels"] == (levels.astype(np.float32) / scale).tolist()


def test_every_format_is_in_the_document():
    assert {row["name"]: (row["format_id"], row["key_bits"], row["value_bits"]) for row in native().formats()} == {
        name: (row[0], row[2], row[4]) for name, row in FORMATS.items()
    }


def test_a_page_splits_by_head(written):
    """Moving pages: the bytes of heads [a, b), taken out, are a page of b - a heads."""
    name, key, value, pages, slots, _, _ = written
    dim, dim_v = key.shape[2], value.shape[2]
    run = pages.shape[1] // HEADS
    part = pages[slots[0] // BLOCK][run : 3 * run]
    for h in (0, 1):
        whole = read(pages[slots[0] // BLOCK], name, h + 1, 7, dim, dim_v, BLOCK)
        for a, b in zip(read(part, name, h, 7, dim, dim_v, BLOCK), whole, strict=True):
            np.testing.assert_array_equal(a, b)
