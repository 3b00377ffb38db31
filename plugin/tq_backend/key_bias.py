"""Key biases, which a turboquant_* preset may not hold, from a model's weights: how large, in which layers, and what to do.

A bias of the key projection is in every key, and these formats give a key one norm: what tells tokens apart then gets what is left of
its levels. The largest bias of a head ranks the layers that lose most (measured: Qwen2.5-Coder 0.5B and 1.5B). Only headers and
the biases themselves are read, by the documented layout of the files: the safetensors package has no bfloat16 without torch. No
torch, no engine.
"""

from __future__ import annotations

import json
import math
import re
import struct
import time
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tq_backend._library import native
from tq_backend.model_layers import BOUNDARY_LAYERS
from tq_backend.names import is_ours
from tq_backend.static_offset import Rotary, left_of, rotary_of

# The norm of a head's bias from which Lloyd-Max keys are known to lose accuracy. Their error is a tenth of the key's norm with 4 bits (a
# fifth with 3), and what a token adds to the bias has a norm of 3 to 6 in the layers that were looked at: from 40 on the error is
# as large. Of the two models, all layers but eight have less than 33; the eight, which lose most, have 53 to 912.
LARGE_NORM = 40.0
# Formats of ours take a static offset out of the keys first; the number is then of what that leaves. (Qwen2.5-Coder 0.5B, code: 80 are left
# in layer 0, at most 25 elsewhere. With layer 0 native the KL of tq_k5v4 falls from 0.049 to 0.005 and that of tq_4 from 0.056 to 0.019.)
# FP8 keys keep three bits of each element whatever its neighbours are; they fail where elements are clipped, beyond e4m3's 448.
LARGE_ELEMENT = 448.0
# So many layers may be native for what vLLM's own list costs: the first and last two.
MOST_NATIVE = 2 * BOUNDARY_LAYERS
# The formats that take a static part out of the keys, best first for a preset with Lloyd-Max and with FP8 keys. tq_8's integers hold what
# is left of any bias that was met.
BETTER, BETTER_THAN_FP8, HOLDS_ALL = ("tq_k5v4", "tq_8", "tq_4"), ("tq_8", "tq_k5v4", "tq_4"), ("tq_8",)

SECONDS = 1.0  # of an engine's start; a network's file system may be slower than knowing this is worth
MOST_HEADER_BYTES = 100_000_000  # the safetensors package's own limit
# Language models only: a vision tower's layers stand under other names, and their keys are not cached.
TENSOR = re.compile(
    r"(?:(?:model|language_model|transformer|gpt_neox|encoder|decoder|text_model|backbone|thinker)\.)*(?:layers|h|blocks)\.(\d{1,4})\."
    r"(?:self_attn|self_attention|attention|attn)\.(?:(k_proj|qkv_proj|query_key_value|c_attn|Wqkv)\.bias|(k_norm|k_layernorm)\.weight)"
)
# How a query_key_value is ordered differs between models: per head its q, k and v, or all q, all k, all v, as the other fused ones.
BY_HEAD, BY_PART = ("gpt_neox", "bloom"), ("chatglm",)
ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Heads:
    """Of the model's attention, on all devices together."""

    model_type: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: Rotary | None = None  # None: no offset is taken from the keys


def heads_of(text: Mapping[str, Any], max_model_len: int | None = None) -> Heads:
    """From a configuration as model_text.text_config gives it. max_model_len: None for the model's own."""
    dim = text["head_dim"]
    rotary = rotary_of(text, dim, max_model_len or text["max_position_embeddings"] or 1)
    return Heads(str(text.get("model_type")), text["num_attention_heads"], text["num_key_value_heads"], dim, rotary)


@dataclass(frozen=True)
class KeyBias:
    layer: int
    norm: float  # of the head with the largest
    element: float  # the largest magnitude
    left: float  # the largest norm of what a static offset leaves of a head's


def read(folder: Path, heads: Heads) -> list[KeyBias]:
    """Of each layer whose cached keys have a bias. Raises ValueError with a sentence if the folder's weights cannot be read."""
    deadline = time.monotonic() + SECONDS
    found: dict[int, KeyBias] = {}
    normalized: set[int] = set()  # after the bias was added, so that it is no part of their keys
    try:
        for file, names in files(folder).items():
            if time.monotonic() > deadline:
                raise ValueError(f"it takes more than {SECONDS:g} s")
            with file.open("rb") as stream:
                header, begin = header_of(stream)
                for name in header if names is None else names:
                    if (match := TENSOR.fullmatch(name)) is None:
                        continue
                    layer = int(match[1])
                    if match[3]:
                        normalized.add(layer)
                    elif bias := key_part(numbers(stream, header[name], begin), match[2], heads):
                        mine = of_heads(layer, bias, heads)
                        found[layer] = max(found.get(layer, mine), mine, key=lambda b: b.norm)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the weights in {folder} cannot be read as safetensors: {error}") from error
    return [found[layer] for layer in sorted(found.keys() - normalized)]


def files(folder: Path) -> dict[Path, list[str] | None]:
    """Those that hold a wanted tensor, and which; None: all that its header names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        found: dict[Path, list[str] | None] = dict.fromkeys(sorted(folder.glob("*.safetensors")))
        if not found:
            raise ValueError("it has no *.safetensors")
        return found
    wanted: dict[Path, list[str] | None] = {}
    for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
        if TENSOR.fullmatch(name):
            if Path(file).name != file:
                raise ValueError(f"{index.name} names {file!r}, which is no file of the folder")
            wanted.setdefault(folder / file, []).append(name)
    return wanted


def header_of(stream: Any) -> tuple[Mapping[str, Any], int]:
    """The tensors' places, and where the bytes they count begin."""
    size = int.from_bytes(stream.read(8), "little")
    if not 2 <= size <= MOST_HEADER_BYTES:
        raise ValueError(f"{stream.name} has a header of {size} bytes")
    header = json.loads(stream.read(size))
    if not isinstance(header, dict):
        raise ValueError(f"the header of {stream.name} is no object")
    return header, 8 + size


def numbers(stream: Any, entry: Mapping[str, Any], begin: int) -> array:
    """A tensor's elements; none of a type that is no float."""
    width = ELEMENT_BYTES.get(entry["dtype"])
    first, last = entry["data_offsets"]
    if width is None:
        return array("d")
    count = math.prod(entry["shape"])
    if last - first != count * width or first < 0:
        raise ValueError(f"{stream.name} has {last - first} bytes for {count} elements of {entry['dtype']}")
    stream.seek(begin + first)
    raw = stream.read(last - first)
    if len(raw) != last - first:
        raise ValueError(f"{stream.name} ends before its tensors do")
    if entry["dtype"] == "BF16":  # the upper half of a float32
        wide = bytearray(2 * len(raw))
        wide[2::4], wide[3::4] = raw[0::2], raw[1::2]
        raw = bytes(wide)
    code = {"F64": "d", "F16": "e"}.get(entry["dtype"], "f")
    return array("d", struct.unpack(f"<{count}{code}", raw))


def key_part(bias: array, projection: str, heads: Heads) -> array | None:
    """The keys' elements, head by head; None of an order that is not known."""
    dim, queries, keys = heads.head_dim, heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
    if projection == "k_proj":
        return bias if len(bias) == keys else None
    if len(bias) != queries + 2 * keys:
        return None
    if projection == "query_key_value" and heads.model_type not in BY_PART:
        if heads.model_type not in BY_HEAD or queries != keys:
            return None
        return array("d", (x for i in range(dim, len(bias), 3 * dim) for x in bias[i : i + dim]))
    return bias[queries : queries + keys]


def of_heads(layer: int, bias: array, heads: Heads) -> KeyBias:
    parts = [bias[i : i + heads.head_dim] for i in range(0, len(bias), heads.head_dim)]
    norms = [math.hypot(*part) for part in parts]
    return KeyBias(layer, max(norms), max(map(abs, bias)), max(left_of(part, heads.rotary) for part in parts))


def lost_by(format_name: str, biases: Iterable[KeyBias]) -> tuple[list[KeyBias], tuple[str, ...]]:
    """The layers on which a format is known to lose accuracy, the worst first, and the formats that are better."""
    row = next((row for row in native().formats() if row["name"] == format_name), None)
    if row is None or row["test_only"]:
        return [], ()
    if not is_ours(format_name):
        large = [] if format_name in HOLDS_ALL else [b for b in biases if b.left > LARGE_NORM]
        return sorted(large, key=lambda b: -b.left), HOLDS_ALL
    if not row["rotates_keys"]:
        return sorted((b for b in biases if b.element > LARGE_ELEMENT), key=lambda b: -b.norm), BETTER_THAN_FP8
    return sorted((b for b in biases if b.norm > LARGE_NORM), key=lambda b: -b.norm), BETTER


def worst_of(lost: list[KeyBias]) -> list[int]:
    return sorted(b.layer for b in lost[:MOST_NATIVE])


def native_by_default(format_name: str, biases: Iterable[KeyBias]) -> list[int] | None:
    """The layers that keep the native cache where nobody names any; None for a preset, whose list is vLLM's."""
    return None if is_ours(format_name) else worst_of(lost_by(format_name, biases)[0])


def sentence(format_name: str, biases: Iterable[KeyBias], native_layers: Iterable[int]) -> str:
    """That a format is known to lose accuracy with these biases, and what to do; "" if it is not, and where the native layers are those that
    would be proposed."""
    lost, better_ones = lost_by(format_name, biases)
    kept = set(native_layers)
    compressed = [b for b in lost if b.layer not in kept]
    here = {row["name"] for row in native().formats()}
    better = next((name for name in better_ones if name in here), None)
    worst = worst_of(lost)
    if not compressed or (better is None and set(worst) <= kept):
        return ""
    top = compressed[0]
    of_it = "" if is_ours(format_name) else f", of which an offset leaves {top.left:.0f},"
    ways = [{"format": better}] if better else []
    ways += [{"skip_layers": worst}]
    use = " or ".join(f"--additional-config '{json.dumps({'turboquant': way})}'" for way in ways)
    return f"{format_name} is known to lose accuracy on this model (key bias {top.norm:.0f}{of_it} in layer {top.layer}): use {use}"
