"""The native module's arguments: no integer is cut, and what is not understood is an error and not a default."""

from __future__ import annotations

import pytest
from tq_backend._library import native

FORMAT = "turboquant_4bit_nc"
BEYOND_32_BITS = (2**32, -(2**32), 2**32 + 16, 2**33, -(2**33), 2**62, -(2**62))
LAYER = {"format": FORMAT, "num_kv_heads": 2, "head_dim": 64}
PLAN = {"block_size": 16, "memory_bytes": 2**30, "max_model_len": 4096}


@pytest.mark.parametrize("added", BEYOND_32_BITS)
def test_integers_are_not_cut(added: int):
    module = native()
    calls = [
        (module.kv_cache_spec, {"format": FORMAT, "num_kv_heads": 2, "head_dim": 64, "head_dim_v": 64}),
        (
            module.unmet,
            {"kind": "cpu", "format": FORMAT, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "head_dim_v": 64},
        ),
        (
            lambda **given: module.plan_pages([LAYER], memory_bytes=2**30, max_model_len=4096, **given),
            {"block_size": 16, "max_block_size": 64, "blocks_per_state": 1},
        ),
        (module.codebook, {"format": FORMAT, "side": "key", "head_dim": 64, "group": 0}),
        (lambda **given: module.align_skip_layers([-1, -1], [0], **given), {"boundary_layers": 1}),
    ]
    for call, given in calls:
        call(**given)
        for name, value in given.items():
            if isinstance(value, int):
                with pytest.raises(ValueError, match=rf"^{name} is {value + added}; it must be from "):
                    call(**given | {name: value + added})
    for name, value in {
        "num_kv_heads": 2, "head_dim": 64, "head_dim_v": 64, "sliding_window": 16, "kv_sharing_target": -1, "native_bytes": 2,
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=rf"^layers\[1\]\.{name} is {value + added}; it must be from "):
            module.plan_pages([LAYER, LAYER | {name: value + added}], **PLAN)
    with pytest.raises(ValueError, match=rf"^kv_sharing_targets\[1\] is {added}; it must be from "):
        module.align_skip_layers([-1, added])
    with pytest.raises(ValueError, match=rf"^skip_layers\[0\] is {added}; it must be from "):
        module.align_skip_layers([-1, -1], [added])


def test_beyond_64_bits():
    for name in ("num_kv_heads", "state_bytes"):
        with pytest.raises(ValueError, match=rf"layers\[0\]\.{name} is beyond 64 bits"):
            native().plan_pages([LAYER | {name: 2**64 + 2}], **PLAN)
    with pytest.raises(TypeError):
        native().plan_pages([LAYER], **PLAN | {"memory_bytes": 2**64})


def test_what_is_not_understood_is_no_default():
    for given, words in (
        ({"head_dim": 64.5}, r"layers\[0\]\.head_dim is 64.5; it must be an integer"),
        ({"head_dim": "64"}, r"layers\[0\]\.head_dim is '64'; it must be an integer"),
        ({"head_dim": None}, r"layers\[0\]\.head_dim is None; it must be an integer"),
        ({"format": 5}, r"layers\[0\]\.format is 5; it must be a format's name, or None"),
    ):
        with pytest.raises(ValueError, match=words):
            native().plan_pages([LAYER | given], **PLAN)
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
    assert native().unmet("cpu", FORMAT, **sizes) == []
    assert "MLA" in native().unmet("cpu", FORMAT, **sizes, attention_kind="mla")[0]
    with pytest.raises(ValueError, match="kind is 'tpu'; it must be one of cpu, cuda, hip"):
        native().unmet("tpu", FORMAT, **sizes)
    with pytest.raises(ValueError, match="attention_kind is 'linear'; it must be one of decoder, encoder, cross, mla"):
        native().unmet("cpu", FORMAT, **sizes, attention_kind="linear")
