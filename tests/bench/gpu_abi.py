"""The public C ABI (csrc/include/tq_backend.h) by ctypes, for torch tensors: what the GPU benchmarks need of it.

Needs libtq_backend.so and torch, and no compiled Python module of ours.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import POINTER, c_char, c_char_p, c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DEVICE = "cuda"
ABI_MAJOR = 1
DEVICE_KINDS = {"cpu": 1, "cuda": 2}
DTYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
DECODER = 1
SIDE_KEY, SIDE_VALUE = 2, 3


class TqFailure(RuntimeError):
    """The one sentence of a TqError."""


class Sized(ctypes.Structure):
    _fields_ = [("struct_size", c_uint32)]

    def __init__(self, **fields: Any) -> None:
        super().__init__(struct_size=ctypes.sizeof(self), **fields)


class Error(Sized):
    _fields_ = [("code", c_int32), ("message", c_char * 512)]


class FormatInfo(Sized):
    _fields_ = [
        ("format_id", c_uint32),
        ("name", c_char * 32),
        ("key_bits", c_int32),
        ("value_bits", c_int32),
        ("test_only", c_int32),
        ("reserved", c_int32),
    ]


class LayerDesc(Sized):
    _fields_ = [
        ("format_id", c_uint32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("head_dim_v", c_int32),
        ("dtype", c_int32),
        ("attention_kind", c_int32),
        ("sliding_window", c_int32),
        ("soft_cap", c_float),
    ]


class KvCacheSpec(Sized):
    _fields_ = [
        ("format_id", c_uint32),
        ("slot_bytes", c_int32),
        ("block_size_multiple", c_int32),
        ("alignment", c_int32),
        ("reserved", c_int32),
        ("bytes_per_token", c_int64),
    ]


class BackendOptions(Sized):
    _fields_ = [
        ("device_kind", c_int32),
        ("device_index", c_int32),
        ("reserved", c_int32),
        ("kernels_dir", c_char_p),
        ("parallel_for", c_void_p),
    ]


class Caps(Sized):
    _fields_ = [
        ("device_kind", c_int32),
        ("library", c_char * 256),
        ("build_id", c_char * 64),
        ("device_name", c_char * 64),
    ]


class Pages(Sized):
    _fields_ = [
        ("format_id", c_uint32),
        ("data", c_void_p),
        ("num_blocks", c_int64),
        ("block_stride_bytes", c_int64),
        ("block_size", c_int32),
        ("reserved", c_int32),
    ]


class StoreKvArgs(Sized):
    _fields_ = [
        ("reserved", c_uint32),
        ("layer", POINTER(LayerDesc)),
        ("pages", POINTER(Pages)),
        ("num_tokens", c_int64),
        ("key", c_void_p),
        ("key_token_stride", c_int64),
        ("key_head_stride", c_int64),
        ("value", c_void_p),
        ("value_token_stride", c_int64),
        ("value_head_stride", c_int64),
        ("slot_mapping", c_void_p),
        ("stream", c_void_p),
        ("key_offset", c_void_p),
    ]


class AttendArgs(Sized):
    _fields_ = [
        ("num_seqs", c_int32),
        ("layer", POINTER(LayerDesc)),
        ("pages", POINTER(Pages)),
        ("num_tokens", c_int64),
        ("query", c_void_p),
        ("query_token_stride", c_int64),
        ("query_head_stride", c_int64),
        ("out", c_void_p),
        ("out_token_stride", c_int64),
        ("out_head_stride", c_int64),
        ("query_start_loc", c_void_p),
        ("seq_lens", c_void_p),
        ("block_table", c_void_p),
        ("block_table_stride", c_int64),
        ("max_blocks_per_seq", c_int32),
        ("scale", c_float),
        ("causal", c_int32),
        ("max_query_len", c_int32),
        ("sinks", c_void_p),
        ("alibi_slopes", c_void_p),
        ("lse", c_void_p),
        ("workspace", c_void_p),
        ("workspace_bytes", c_uint64),
        ("stream", c_void_p),
        ("spans", c_void_p),
        ("max_spans", c_int32),
        ("reserved", c_int32),
    ]


class DequantKvArgs(Sized):
    _fields_ = [
        ("keep_rotated", c_int32),
        ("layer", POINTER(LayerDesc)),
        ("pages", POINTER(Pages)),
        ("num_seqs", c_int32),
        ("max_blocks_per_seq", c_int32),
        ("block_table", c_void_p),
        ("block_table_stride", c_int64),
        ("first_tokens", c_void_p),
        ("token_start_loc", c_void_p),
        ("token_counts", c_void_p),
        ("num_tokens", c_int64),
        ("key_out", c_void_p),
        ("value_out", c_void_p),
        ("stream", c_void_p),
    ]


class RotateArgs(Sized):
    _fields_ = [
        ("num_heads", c_int32),
        ("side", c_int32),
        ("reserved", c_int32),
        ("layer", POINTER(LayerDesc)),
        ("num_tokens", c_int64),
        ("x", c_void_p),
        ("x_token_stride", c_int64),
        ("x_head_stride", c_int64),
        ("out", c_void_p),
        ("out_token_stride", c_int64),
        ("out_head_stride", c_int64),
        ("stream", c_void_p),
    ]


class FakeQuantizeArgs(Sized):
    _fields_ = [
        ("format_id", c_uint32),
        ("side", c_int32),
        ("head_dim", c_int32),
        ("num_rows", c_int64),
        ("in_", c_void_p),
        ("out", c_void_p),
    ]


def _function(result: Any, *arguments: Any) -> Any:
    return ctypes.CFUNCTYPE(result, *arguments)


class Api(Sized):
    """The function table in the header's order; what is not called from here is a bare pointer."""

    _fields_ = [
        ("major", c_int32),
        ("minor", c_int32),
        ("reserved", c_uint32),
        ("build_id", _function(c_char_p)),
        ("list_formats", c_void_p),
        ("format_by_name", _function(c_int32, c_char_p, POINTER(FormatInfo), POINTER(Error))),
        ("codebook", c_void_p),
        ("fake_quantize", _function(c_int32, POINTER(FakeQuantizeArgs), POINTER(Error))),
        ("kv_cache_spec", _function(c_int32, POINTER(LayerDesc), POINTER(KvCacheSpec), POINTER(Error))),
        ("plan_pages", c_void_p),
        ("align_skip_layers", c_void_p),
        ("list_libraries", c_void_p),
        ("create_backend", _function(c_int32, POINTER(BackendOptions), POINTER(c_void_p), POINTER(Error))),
        ("destroy_backend", c_void_p),
        ("query_caps", _function(c_int32, c_void_p, POINTER(Caps), POINTER(Error))),
        ("query_counters", c_void_p),
        ("check_layer", c_void_p),
        ("unmet_reason", c_void_p),
        (
            "workspace_size",
            _function(c_int32, c_void_p, POINTER(LayerDesc), POINTER(c_uint64), POINTER(Error)),
        ),
        ("store_kv", _function(c_int32, c_void_p, POINTER(StoreKvArgs), POINTER(Error))),
        ("attend", _function(c_int32, c_void_p, POINTER(AttendArgs), POINTER(Error))),
        ("dequant_kv", _function(c_int32, c_void_p, POINTER(DequantKvArgs), POINTER(Error))),
        ("copy_pages", c_void_p),
        ("rotate", _function(c_int32, c_void_p, POINTER(RotateArgs), POINTER(Error))),
    ]


@dataclass(frozen=True)
class Layer:
    format: str
    heads: int
    kv_heads: int
    dim: int
    window: int = 0


class Backend:
    """One backend of the library, for as long as the process lives. The methods that launch return the prepared call: it may be made any number of times, on
    whatever stream is torch's current one then, and it keeps its tensors alive."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.tq_get_api.restype = POINTER(Api)
        self._library.tq_get_api.argtypes = [c_uint32, POINTER(Error)]
        error = Error()
        table = self._library.tq_get_api(ABI_MAJOR, ctypes.byref(error))
        if not table:
            raise TqFailure(error.message.decode())
        self._api = table.contents
        self._handle = c_void_p()
        options = BackendOptions(device_kind=DEVICE_KINDS[DEVICE], kernels_dir=str(library.resolve().parent).encode())
        self._call("create_backend", ctypes.byref(options), ctypes.byref(self._handle))
        caps = Caps()
        self._call("query_caps", self._handle, ctypes.byref(caps))
        self.device_name = caps.device_name.decode()
        self.build_id = self._api.build_id().decode()

    def _call(self, name: str, *arguments: Any) -> None:
        error = Error()
        if getattr(self._api, name)(*arguments, ctypes.byref(error)) != 0:
            raise TqFailure(f"{name}: {error.message.decode()}")

    @functools.cache  # noqa: B019 - there is one backend
    def format_id(self, name: str) -> int:
        info = FormatInfo()
        self._call("format_by_name", name.encode(), ctypes.byref(info))
        return info.format_id

    def _desc(self, layer: Layer, dtype: torch.dtype) -> LayerDesc:
        return LayerDesc(
            format_id=self.format_id(layer.format), num_heads=layer.heads, num_kv_heads=layer.kv_heads,
            head_dim=layer.dim, head_dim_v=layer.dim, dtype=DTYPES[dtype], attention_kind=DECODER,
            sliding_window=layer.window,
        )  # fmt: skip

    def slot_bytes(self, layer: Layer) -> int:
        spec = KvCacheSpec()
        self._call("kv_cache_spec", ctypes.byref(self._desc(layer, torch.bfloat16)), ctypes.byref(spec))
        return spec.slot_bytes

    def workspace_size(self, layer: Layer) -> int:
        size = c_uint64()
        desc = self._desc(layer, torch.bfloat16)
        self._call("workspace_size", self._handle, ctypes.byref(desc), ctypes.byref(size))
        return size.value

    def _pages(self, layer: Layer, pool: torch.Tensor, block_size: int) -> Pages:
        page_bytes = layer.kv_heads * block_size * self.slot_bytes(layer)
        return Pages(
            format_id=self.format_id(layer.format), data=pool.data_ptr(), num_blocks=pool.numel() // page_bytes,
            block_stride_bytes=page_bytes, block_size=block_size,
        )  # fmt: skip

    def _launch(self, name: str, args: Sized, *keep: torch.Tensor) -> Callable[[], None]:
        def call() -> None:
            args.stream = torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else None
            self._call(name, self._handle, ctypes.byref(args))

        call.keep = keep  # type: ignore[attr-defined]
        return call

    def store_kv(
        self,
        layer: Layer,
        pool: torch.Tensor,
        block_size: int,
        key: torch.Tensor,
        value: torch.Tensor,
        slots: torch.Tensor,
    ) -> Callable[[], None]:
        """key, value: [tokens, kv_heads, dim]; slots: int64."""
        args = StoreKvArgs(
            layer=ctypes.pointer(self._desc(layer, key.dtype)), pages=ctypes.pointer(self._pages(layer, pool, block_size)),
            num_tokens=len(slots), key=key.data_ptr(), key_token_stride=key.stride(0), key_head_stride=key.stride(1),
            value=value.data_ptr(), value_token_stride=value.stride(0), value_head_stride=value.stride(1),
            slot_mapping=slots.data_ptr(),
        )  # fmt: skip
        return self._launch("store_kv", args, pool, key, value, slots)

    def attend(
        self, layer: Layer, pool: torch.Tensor, block_size: int, query: torch.Tensor, out: torch.Tensor, start: torch.Tensor,
        lens: torch.Tensor, table: torch.Tensor, max_query_len: int, workspace: torch.Tensor,
    ) -> Callable[[], None]:  # fmt: skip
        """Causal. query, out: [tokens, heads, dim]; start, lens, table: int32."""
        args = AttendArgs(
            num_seqs=len(lens), layer=ctypes.pointer(self._desc(layer, query.dtype)),
            pages=ctypes.pointer(self._pages(layer, pool, block_size)), num_tokens=len(query), query=query.data_ptr(),
            query_token_stride=query.stride(0), query_head_stride=query.stride(1), out=out.data_ptr(),
            out_token_stride=out.stride(0), out_head_stride=out.stride(1), query_start_loc=start.data_ptr(),
            seq_lens=lens.data_ptr(), block_table=table.data_ptr(), block_table_stride=table.stride(0),
            max_blocks_per_seq=table.shape[1], scale=layer.dim**-0.5, causal=1, max_query_len=max_query_len,
            workspace=workspace.data_ptr(), workspace_bytes=workspace.numel(),
        )  # fmt: skip
        return self._launch("attend", args, pool, query, out, start, lens, table, workspace)

    def dequant_kv(
        self, layer: Layer, pool: torch.Tensor, block_size: int, table: torch.Tensor, first: torch.Tensor,
        start: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keep_rotated: bool = False,
        counts: torch.Tensor | None = None,
    ) -> Callable[[], None]:  # fmt: skip
        """table: [seqs, blocks]; first, counts: [seqs]; start: [seqs + 1]; all int32. key, value: [rows, kv_heads, dim]."""
        args = DequantKvArgs(
            keep_rotated=int(keep_rotated), layer=ctypes.pointer(self._desc(layer, key.dtype)),
            pages=ctypes.pointer(self._pages(layer, pool, block_size)), num_seqs=len(first),
            max_blocks_per_seq=table.shape[1], block_table=table.data_ptr(), block_table_stride=table.stride(0),
            first_tokens=first.data_ptr(), token_start_loc=start.data_ptr(),
            token_counts=None if counts is None else counts.data_ptr(), num_tokens=len(key), key_out=key.data_ptr(),
            value_out=value.data_ptr(),
        )  # fmt: skip
        keep = (pool, table, first, start, key, value) + (() if counts is None else (counts,))
        return self._launch("dequant_kv", args, *keep)

    def dequant_first(
        self, layer: Layer, pool: torch.Tensor, block_size: int, table: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        keep_rotated: bool = False,
    ) -> Callable[[], None]:  # fmt: skip
        """The first len(key) tokens of the one sequence whose blocks are table: [blocks]."""
        first = torch.zeros(1, dtype=torch.int32, device=table.device)
        start = torch.tensor([0, len(key)], dtype=torch.int32, device=table.device)
        return self.dequant_kv(layer, pool, block_size, table[None], first, start, key, value, keep_rotated)

    def rotate(self, layer: Layer, x: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
        """x, out: [tokens, any number of heads, dim]."""
        args = RotateArgs(
            num_heads=x.shape[1], side=SIDE_KEY, layer=ctypes.pointer(self._desc(layer, x.dtype)), num_tokens=len(x), x=x.data_ptr(),
            x_token_stride=x.stride(0), x_head_stride=x.stride(1), out=out.data_ptr(), out_token_stride=out.stride(0),
            out_head_stride=out.stride(1),
        )  # fmt: skip
        return self._launch("rotate", args, x, out)

    def fake_quantize(self, layer: Layer, rows: torch.Tensor, is_key: bool) -> torch.Tensor:
        """The host reference codec: what float rows [n, dim] read back as."""
        rows = rows.float().cpu().contiguous()
        out = torch.empty_like(rows)
        args = FakeQuantizeArgs(
            format_id=self.format_id(layer.format), side=SIDE_KEY if is_key else SIDE_VALUE, head_dim=layer.dim,
            num_rows=len(rows), in_=rows.data_ptr(), out=out.data_ptr(),
        )  # fmt: skip
        self._call("fake_quantize", ctypes.byref(args))
        return out
