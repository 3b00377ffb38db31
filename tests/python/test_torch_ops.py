"""What the LibTorch operators refuse, in which words: devices, and the arguments that not every kernel takes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from tq_backend._library import device_index, native, torch_ops  # noqa: E402

HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 64, 16
FORMAT = "turboquant_4bit_nc"


def arguments() -> dict[str, object]:
    """Of attend, for two sequences with 1 and 3 query tokens of 16 each."""
    spec = native().kv_cache_spec(FORMAT, KV_HEADS, DIM)
    size = torch_ops().workspace_size(HEADS, KV_HEADS, DIM, DIM, spec["format_id"])
    return {
        "query": torch.zeros(4, HEADS, DIM),
        "out": torch.zeros(4, HEADS, DIM),
        "pages": torch.zeros(2, spec["bytes_per_token"] * BLOCK, dtype=torch.uint8),
        "query_start_loc": torch.tensor([0, 1, 4], dtype=torch.int32),
        "seq_lens": torch.tensor([16, 16], dtype=torch.int32),
        "block_table": torch.tensor([[0], [1]], dtype=torch.int32),
        "format_id": spec["format_id"],
        "block_size": BLOCK,
        "num_kv_heads": KV_HEADS,
        "scale": DIM**-0.5,
        "causal": True,
        "sliding_window": 0,
        "soft_cap": 0.0,
        "sinks": None,
        "alibi_slopes": None,
        "lse": None,
        "workspace": torch.zeros(size, dtype=torch.uint8),
    }


def on_the_cpu_kernel(name: str, **given: object) -> None:
    """The dispatcher sends a call with a tensor of another device to that device's kernel; this is the CPU's, whatever comes."""
    getattr(torch_ops(), name).default._op_dk(torch._C.DispatchKey.CPU, **given)


def test_max_query_len_is_a_bound_or_0():
    given = arguments()
    for bound in (0, 3, 100):
        torch_ops().attend(**given, max_query_len=bound)
    with pytest.raises(RuntimeError, match=r"max_query_len is 2; sequence 1 has 3 query tokens"):
        torch_ops().attend(**given, max_query_len=2)
    with pytest.raises(RuntimeError, match=r"max_query_len is -5; it must be 0 \(not known\) or an upper bound"):
        torch_ops().attend(**given, max_query_len=-5)


# What a cast to 32 bits makes of them: the number that was there, none, and a negative one.
BEYOND_32_BITS = (2**32, -(2**32), 2**32 + 16, 2**33, -(2**33), 2**63 - 1, -(2**63))


@pytest.mark.parametrize("name", ["sliding_window", "format_id", "num_kv_heads", "block_size", "max_query_len"])
@pytest.mark.parametrize("added", BEYOND_32_BITS)
def test_integers_of_attend_are_not_cut(name: str, added: int):
    given = arguments() | {"max_query_len": 3}
    torch_ops().attend(**given)
    value = max(-(2**63), min(2**63 - 1, given[name] + added))
    with pytest.raises(RuntimeError, match=rf"tq_backend: {name} is {value}; it must be from "):
        torch_ops().attend(**given | {name: value})


@pytest.mark.parametrize("added", BEYOND_32_BITS)
def test_integers_of_the_other_operators_are_not_cut(added: int):
    def beyond(value: int) -> int:
        return max(-(2**63), min(2**63 - 1, value + added))

    spec = native().kv_cache_spec(FORMAT, KV_HEADS, DIM)
    key = torch.zeros(1, KV_HEADS, DIM)
    pages = torch.zeros(1, spec["bytes_per_token"] * BLOCK, dtype=torch.uint8)
    for format_id, block_size, name in (
        (beyond(spec["format_id"]), BLOCK, "format_id"),
        (spec["format_id"], beyond(BLOCK), "block_size"),
    ):
        with pytest.raises(RuntimeError, match=rf"{name} is -?\d+; it must be from "):
            torch_ops().store_kv(key, key, pages, torch.zeros(1, dtype=torch.int64), format_id, block_size)
        with pytest.raises(RuntimeError, match=rf"{name} is -?\d+; it must be from "):
            torch_ops().dequant_kv(**dequant_arguments() | {"format_id": format_id, "block_size": block_size})
    with pytest.raises(RuntimeError, match=r"format_id is -?\d+; it must be from 0 to 4294967295"):
        torch_ops().rotate(key, torch.zeros_like(key), beyond(spec["format_id"]))
    sizes = {
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": DIM,
        "head_dim_v": DIM,
        "format_id": spec["format_id"],
    }
    assert torch_ops().workspace_size(**sizes) > 0
    for name, size in sizes.items():
        with pytest.raises(RuntimeError, match=rf"{name} is -?\d+; it must be from "):
            torch_ops().workspace_size(**sizes | {name: beyond(size)})
    with pytest.raises(RuntimeError, match=r"device_index is -?\d+; it must be -1 for the CPU"):
        torch_ops().counters(beyond(-1))


def test_floats_of_attend_stay_what_they_are():
    """1e-60 as a float32 is 0, which for a soft cap means none."""
    for name, value in (("soft_cap", 1e-60), ("soft_cap", 1e300), ("scale", 1e-60), ("scale", -1e300)):
        with pytest.raises(RuntimeError, match=rf"{name} is .*; a 32-bit float does not hold it"):
            torch_ops().attend(**arguments() | {name: value})


def test_spans_are_checked():
    given = arguments()
    torch_ops().attend(**given, spans=torch.zeros(2, 0, 2, dtype=torch.int32))  # room for none is none
    for spans, words in (
        (torch.zeros(2, 1, 2), "spans has another dtype than int32"),
        (torch.zeros(2, 2, dtype=torch.int32), "spans has 2 dimensions; it must have 3"),
        (torch.zeros(3, 1, 2, dtype=torch.int32), "spans has size 3 in dimension 0; it must be 2"),
        (torch.zeros(2, 1, 3, dtype=torch.int32), "spans has size 3 in dimension 2; it must be 2"),
        (torch.zeros(2, 2, 2, dtype=torch.int32).transpose(0, 1), "spans is not contiguous"),
    ):
        with pytest.raises(RuntimeError, match=words):
            torch_ops().attend(**given, spans=spans)


@pytest.mark.parametrize(
    "name", ["out", "pages", "query_start_loc", "seq_lens", "block_table", "sinks", "alibi_slopes", "lse", "spans", "workspace"]
)  # fmt: skip
def test_tensors_are_on_one_device(name):
    given = arguments()
    like = {"lse": torch.zeros(4, HEADS), "spans": torch.zeros(2, 1, 2, dtype=torch.int32)}
    elsewhere = given.get(name) if given.get(name) is not None else like.get(name, torch.zeros(HEADS))
    given[name] = elsewhere.to("meta")
    with pytest.raises(
        RuntimeError, match=rf"{name} is on neither .* and query on the CPU; they must be on one device"
    ):
        on_the_cpu_kernel("attend", **given)


@pytest.mark.parametrize("kernel", ["CPU", "CUDA"])
def test_gpus_are_named(kernel):
    """With tensors that only say that they are on a GPU: no memory of theirs is read before the sentence."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    given = arguments()
    with FakeTensorMode():
        on_gpu = {
            name: torch.empty(t.shape, dtype=t.dtype, device="cuda:0")
            for name, t in given.items()
            if isinstance(t, torch.Tensor)
        }
        elsewhere = torch.empty(2, dtype=torch.int32, device="cuda:1")
    for mixed, words in (
        ({"seq_lens": elsewhere}, "seq_lens is on GPU 1 and query on the CPU"),
        ({"query": on_gpu["query"]}, "out is on the CPU and query on GPU 0"),
        (on_gpu | {"seq_lens": elsewhere}, "seq_lens is on GPU 1 and query on GPU 0"),
    ):
        with pytest.raises(RuntimeError, match=f"{words}; they must be on one device"):
            torch_ops().attend.default._op_dk(getattr(torch._C.DispatchKey, kernel), **given | mixed)


def test_the_first_tensor_is_on_a_device_that_is_served():
    given = arguments()
    given["query"] = given["query"].to("meta")
    with pytest.raises(RuntimeError, match="query is on neither the CPU nor a CUDA or ROCm device"):
        on_the_cpu_kernel("attend", **given)


def dequant_arguments() -> dict[str, object]:
    """Of dequant_kv, for two sequences with 1 and 3 tokens to decode, of one page each."""
    spec = native().kv_cache_spec(FORMAT, KV_HEADS, DIM)
    return {
        "pages": torch.zeros(2, spec["bytes_per_token"] * BLOCK, dtype=torch.uint8),
        "block_table": torch.tensor([[0], [1]], dtype=torch.int32),
        "first_tokens": torch.tensor([0, 5], dtype=torch.int32),
        "token_start_loc": torch.tensor([0, 1, 4], dtype=torch.int32),
        "format_id": spec["format_id"],
        "block_size": BLOCK,
        "key_out": torch.zeros(4, KV_HEADS, DIM),
        "value_out": torch.zeros(4, KV_HEADS, DIM),
        "keep_rotated": False,
    }


def test_store_dequant_and_rotate_name_the_tensor_too():
    spec = native().kv_cache_spec(FORMAT, KV_HEADS, DIM)
    pages = torch.zeros(1, spec["bytes_per_token"] * BLOCK, dtype=torch.uint8)
    key = torch.zeros(1, KV_HEADS, DIM)
    with pytest.raises(RuntimeError, match=r"slot_mapping is on neither .* and key on the CPU"):
        on_the_cpu_kernel(
            "store_kv", key=key, value=key, pages=pages, slot_mapping=torch.zeros(1, dtype=torch.int64, device="meta"),
            format_id=spec["format_id"], block_size=BLOCK,
        )  # fmt: skip
    given = dequant_arguments()
    for name in ("pages", "block_table", "first_tokens", "token_start_loc", "value_out"):
        with pytest.raises(RuntimeError, match=rf"{name} is on neither .* and key_out on the CPU"):
            on_the_cpu_kernel("dequant_kv", **given | {name: given[name].to("meta")})
    with pytest.raises(RuntimeError, match=r"token_counts is on neither .* and key_out on the CPU"):
        on_the_cpu_kernel("dequant_kv", **given, token_counts=torch.zeros(2, dtype=torch.int32, device="meta"))
    with pytest.raises(RuntimeError, match=r"out is on neither .* and x on the CPU"):
        on_the_cpu_kernel("rotate", x=key, out=key.to("meta"), format_id=spec["format_id"])


def test_shapes_of_dequant_and_rotate_are_checked():
    given = dequant_arguments()
    torch_ops().dequant_kv(**given)
    for name, wrong, words in (
        ("block_table", given["block_table"][:1], "block_table has 1 rows; there are 2 sequences"),
        ("block_table", given["block_table"][0], "block_table has 1 dimensions; it must have 2"),
        ("first_tokens", given["first_tokens"].long(), "first_tokens has another dtype than int32"),
        ("token_start_loc", given["token_start_loc"][:2], "token_start_loc has size 2 in dimension 0; it must be 3"),
        ("token_counts", torch.zeros(3, dtype=torch.int32), "token_counts has size 3 in dimension 0; it must be 2"),
        ("value_out", torch.zeros(3, KV_HEADS, DIM), "value_out has size 3 in dimension 0; it must be 4"),
        ("first_tokens", given["first_tokens"] + 9, "its block table holds 16 tokens"),
    ):
        with pytest.raises(RuntimeError, match=words):
            torch_ops().dequant_kv(**given | {name: wrong})
    x = torch.zeros(3, HEADS, DIM)
    for out, words in (
        (torch.zeros(2, HEADS, DIM), "out has size 2 in dimension 0; it must be 3"),
        (torch.zeros(3, HEADS, DIM, dtype=torch.float16), "out has another dtype than the other tensors"),
    ):
        with pytest.raises(RuntimeError, match=words):
            torch_ops().rotate(x, out, given["format_id"])


def test_key_offset_is_taken_from_the_keys_and_checked():
    spec = native().kv_cache_spec("tq_8", 2, 64)
    key, value = torch.randn(2, 20, 2, 64, generator=torch.Generator().manual_seed(5))
    offset = 300 * torch.arange(128, dtype=torch.float32).sub(64).sign().reshape(2, 64)

    def stored(key: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
        pages = torch.zeros(2, 16 * spec["bytes_per_token"], dtype=torch.uint8)
        torch_ops().store_kv(key, value, pages, torch.arange(20), spec["format_id"], 16, offset)
        return pages

    assert torch.equal(stored(key + offset, offset), stored(key + offset - offset, None))
    assert not torch.equal(stored(key + offset, offset), stored(key + offset, None))
    for wrong, words in (
        (offset.half(), "key_offset has another dtype than float32"),
        (offset[:1], "key_offset has size 1 in dimension 0; it must be 2"),
        (offset[:, :32], "key_offset has size 32 in dimension 1; it must be 64"),
        (offset[0], "key_offset has 1 dimensions; it must have 2"),
        (torch.zeros(2, 128)[:, :64], "key_offset is strided"),
    ):
        with pytest.raises(RuntimeError, match=words):
            stored(key, wrong)


def test_rotated_queries_meet_rotated_keys():
    """Scores of queries with keys are those of rotated queries with keys that stayed rotated; head_dim 80 turns in two blocks."""
    generator = torch.Generator().manual_seed(11)
    for name, dim in ((FORMAT, 80), ("turboquant_k3v4_nc", 128), ("turboquant_k8v4", 128)):
        spec = native().kv_cache_spec(name, KV_HEADS, dim)
        pages = torch.zeros(2, spec["bytes_per_token"] * BLOCK, dtype=torch.uint8)
        key = torch.randn(20, KV_HEADS, dim, generator=generator)
        torch_ops().store_kv(key, key, pages, torch.arange(20), spec["format_id"], BLOCK)
        table = torch.tensor([[0, 1]], dtype=torch.int32)
        first, start = torch.tensor([2], dtype=torch.int32), torch.tensor([0, 18], dtype=torch.int32)
        plain, kept, value = torch.zeros(3, 18, KV_HEADS, dim).unbind()
        for out, keep in ((plain, False), (kept, True)):
            torch_ops().dequant_kv(pages, table, first, start, spec["format_id"], BLOCK, out, value, keep)
        query = torch.randn(5, KV_HEADS, dim, generator=generator)
        rotated = torch.empty_like(query)
        torch_ops().rotate(query, rotated, spec["format_id"])
        assert torch.equal(rotated, query) == (name == "turboquant_k8v4")
        # Sums of 128 products of float32 numbers below 5.
        want = torch.einsum("qhd,khd->hqk", query.double(), plain.double())
        got = torch.einsum("qhd,khd->hqk", rotated.double(), kept.double())
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_device_index():
    assert device_index(torch.device("cpu")) == -1
    assert device_index(torch.device("cuda", 3)) == 3
    assert torch_ops().counters() == torch_ops().counters(-1)
    for wrong in (-2, 1000):
        with pytest.raises(
            RuntimeError, match=rf"device_index is {wrong}; it must be -1 for the CPU, or a GPU's index"
        ):
            torch_ops().counters(wrong)


def test_a_gpu_without_its_kernels_is_said(tmp_path):
    """In a folder of no kernel libraries; what torch was built for decides which one is missed."""
    code = "from tq_backend._library import torch_ops; torch_ops().workspace_size(4, 2, 64, 64, 0x0201, 0)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env=os.environ | {"TQ_KERNELS_DIR": str(tmp_path)},
    )  # fmt: skip
    if torch.version.cuda or torch.version.hip:
        kind = "hip" if torch.version.hip else "cuda"
        assert f"this package was built without the {kind} kernels" in done.stderr
    else:
        assert "this torch was built for CPUs only" in done.stderr
