"""The planner's pages reach the engine: mixed head dimensions, windows, recurrent states, a native layer beside compressed ones."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import sys
from dataclasses import fields, replace
from functools import partial
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from engines import ROOT, running
from tq_backend.cli.plan import IN_FLIGHT_TOKENS, plan
from tq_backend.register import register
from tq_backend.vllm_adapter import coverage, page_plan, patches
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheLayout,
    MambaSpec,
    RSWASpec,
    SlidingWindowSpec,
    get_kv_quant_mode,
)

sys.path.insert(0, str(ROOT / "tests" / "bench"))
import engine_arithmetic as arithmetic

DTYPE = "turboquant_4bit_nc"
GIB = 1 << 30
MODELS = json.loads((ROOT / "tests" / "bench" / "model_configs.json").read_text())


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What the adapter says of its plan. vLLM takes handlers off its loggers when a process starts its first engine."""
    lines: list[str] = []
    monkeypatch.setattr(page_plan, "say", lambda level, line: lines.append(line))
    return lines


# The CPU engine keeps the recurrent state in float32, whatever the model's dtype; `tq plan` reads that from this key.
STATE = {"mamba_ssm_dtype": "float32"}
ENGINES = {
    "gemma4": ([0], {"dtype": "float32", "max_num_batched_tokens": 128}),  # heads of 32 and 64, windows, shared caches
    "gemma3n": ([0], {"dtype": "float32", "max_num_batched_tokens": 128}),
    "qwen3_next": ([1], {"dtype": "bfloat16", "max_num_batched_tokens": 513}),
}


@pytest.mark.parametrize("name", ENGINES)
def test_the_engine_reports_the_planners_tokens(name, tmp_path, said, monkeypatch):
    skip, options = ENGINES[name]
    options = options | {"context": 512, "skip_tokenizer_init": True, "model": tiny_models.make(name, tmp_path)}
    options["additional_config"] = {"turboquant": {"skip_layers": skip}}

    def start() -> tuple[int, SimpleNamespace]:
        with running(DTYPE, **options) as engine:
            config = engine.llm.llm_engine.vllm_config
            return config.cache_config.kv_cache_size_tokens, SimpleNamespace(
                length=config.model_config.max_model_len, in_flight=config.max_in_flight_tokens
            )

    tokens, engine = start()
    config = json.loads((options["model"] / "config.json").read_text()) | {"dtype": options["dtype"]} | STATE
    found = plan(
        config, DTYPE, page_plan.CPU_KERNEL_BLOCK, GIB, max_model_len=engine.length, in_flight_tokens=engine.in_flight, skip=skip
    )  # fmt: skip
    assert tokens == found["kv_tokens"]
    line = next(line for line in said if "plans pages" in line)
    assert f"waste {found['waste_bytes']} bytes, " in line and " %; --additional-config" in line, line
    assert any(re.search(r"compressed: \d+ of \d+ layers, [1-9]\.\dx less memory than", line) for line in said), said

    monkeypatch.setattr(page_plan, "grouped", lambda own, vllm_config, specs: own(vllm_config, specs))
    alone, _ = start()
    print(name, "KV tokens", tokens, "with vLLM's own planning", alone)
    assert tokens > 2 * alone


# From here on without an engine: specs of numbers, and the engine's own grouping and counting behind the adapter.


def attention(window: int = 0, heads: int = 2, dim: int = 64, native: bool = False, block_size: int = 16, **more):
    spec = dict(
        block_size=block_size, num_kv_heads=heads, head_size=dim, dtype=torch.bfloat16 if native else torch.uint8
    )
    if not native:
        spec |= {"kv_quant_mode": get_kv_quant_mode(DTYPE), "state_content_bytes": dim + 6}
    spec |= more
    return SlidingWindowSpec(**spec, sliding_window=window) if window else FullAttentionSpec(**spec)


def state(size: int, block_size: int = 8192):
    return MambaSpec(block_size=block_size, shapes=((size,),), dtypes=(torch.uint8,))


def config_for(specs: dict, layout=KVCacheLayout.LBHNC, **changes):
    """As much of a VllmConfig as planning reads."""
    config = arithmetic.engine_config(64 * GIB, 8192, 1024, layout, 1, 16)
    vars(config.cache_config).update(user_specified_block_size=False, cache_dtype=DTYPE)
    vars(config.cache_config).update(changes)
    return config


def grouped(specs: dict, **changes):
    """Each layer's block size, and the groups."""
    own = patches.unwrapped(patches.planning_module().get_kv_cache_groups)
    groups = page_plan.grouped(own, config_for(specs, **changes), specs)
    return {name: group.kv_cache_spec for group in groups for name in group.layer_names}


def numbered(*specs) -> dict:
    return {str(i): spec for i, spec in enumerate(specs)}


def test_a_uniform_spec_keeps_the_engines_block_size(said):
    specs = numbered(attention(native=True, block_size=128), attention(block_size=128), attention(block_size=128))
    for group in grouped(specs).values():
        assert {spec.block_size for spec in group.kv_cache_specs.values()} == {128}
        assert all(spec.page_size_padded is None for spec in group.kv_cache_specs.values())
    assert "one group, pages of their own sizes" in said[0] and "waste 0 bytes, 0.00 %" in said[0]


def test_compressed_pages_grow_to_a_native_page_instead_of_being_padded(said):
    """512 bytes a token and 140: three compressed blocks and a bit fit into a native one."""
    specs = numbered(attention(native=True, window=1024), *[attention() for _ in range(4)])
    found = grouped(specs)
    assert found["0"].page_size_bytes == found["1"].page_size_bytes
    assert found["1"].block_size * 140 > 0.8 * found["1"].page_size_bytes
    assert math.lcm(*(spec.block_size for spec in found.values())) <= 1024
    assert "skip_layers" in said[0] and "would save" in said[0]


def test_a_users_block_size_is_the_smallest_page(said):
    specs = numbered(attention(native=True, window=1024, block_size=64), *[attention(block_size=64) for _ in range(4)])
    found = grouped(specs, user_specified_block_size=True, block_size=64)
    assert all(spec.block_size % 64 == 0 for spec in found.values())


def test_states_cached_for_prefixes_keep_their_block_size(said):
    """The workers know it from their configuration, and the scheduler takes the smallest block for it."""
    specs = numbered(
        *[replace(state(50_000, 96), mamba_cache_mode="align") for _ in range(3)], attention(native=True), attention()
    )
    found = grouped(specs, mamba_cache_mode="align", mamba_block_size=96)
    assert {found[i].block_size for i in "012"} == {96}
    assert all(found[i].block_size % 96 == 0 for i in "34")
    grouped(numbered(replace(state(50_000, 960), mamba_cache_mode="align"), attention()), mamba_cache_mode="align")
    assert "skip_layers" in said[0] and "--no-enable-prefix-caching would save" in said[2]


def test_kernels_with_fixed_block_sizes_are_not_given_padded_pages(said):
    """Their backend splits larger blocks, which a padded page does not allow."""
    from vllm.v1.attention.backend import MultipleOf

    fixed = attention(native=True, window=1024, block_size=64, block_stride_alignment=MultipleOf(64))
    specs = numbered(fixed, *[attention(block_size=64) for _ in range(4)], state(400_001))
    grouped(specs)
    assert "leaves the page sizes to vLLM: 0 runs in blocks of 64 tokens, and a padded page cannot be split" in said[0]


def test_kernels_that_want_aligned_pages_get_them_or_vllms(said):
    aligned = attention(native=True, window=1024, block_stride_alignment=4099)
    grouped(numbered(aligned, *[attention() for _ in range(4)]))
    assert "leaves the page sizes to vLLM: 0 needs pages that are a multiple of 4099 bytes" in said[0]


def test_a_layer_that_the_planner_does_not_know_is_left_to_the_engine(said):
    strange = RSWASpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, rswa_window=64)
    assert set(grouped(numbered(attention(), strange))) == {"0", "1"}
    assert "leaves the page sizes to vLLM: 1 has a RSWASpec" in said[0]
    # What vLLM's padding costs is not known here.
    assert said[1].startswith("compressed: 1 of 2 layers, 1.6x fewer bytes per token than bfloat16, without padding")
    grouped(numbered(attention(native=True), chunked(64), state(1000)))
    assert "2 has a MambaSpec beside layers that attend in chunks" in said[2]
    grouped(numbered(attention(native=True), chunked(24)))
    assert "whose blocks are a multiple of 32 and divide chunks of 24 tokens" in said[4]
    # Where only native layers attend in chunks, all layers keep all tokens, in pages of their own sizes.
    assert {
        spec.page_size_padded
        for spec in grouped(numbered(attention(), chunked(24, native=True)))["0"].kv_cache_specs.values()
    } == {None}


def chunked(size: int, native: bool = False, **more):
    spec = attention(native=native, **more)
    shared = {field.name: getattr(spec, field.name) for field in fields(AttentionSpec)}
    return ChunkedLocalAttentionSpec(**shared, attention_chunk_size=size)


SCOUT = {"layers": 48, "chunk": 8192, "length": 131072}  # Llama 4 Scout: every fourth layer has full attention


def scout(native: list[int]) -> dict:
    shape = {"heads": 8, "dim": 128}
    return {
        f"model.layers.{i}.self_attn.attn": attention(native=i in native, **shape)
        if i % 4 == 3
        else chunked(SCOUT["chunk"], native=i in native, **shape)
        for i in range(SCOUT["layers"])
    }


@pytest.mark.parametrize(("native", "times"), [([0, 1, 46, 47], 1.8), ([], 3.8)])
@pytest.mark.parametrize("platform_block", [16, 32])
def test_chunks_are_planned_where_native_layers_are_between(native, times, platform_block, said, monkeypatch):
    """What the engine counts for Llama 4 Scout; with vLLM's own page sizes four native layers cost the whole saving."""
    monkeypatch.setattr(page_plan, "CPU_KERNEL_BLOCK", platform_block)  # as on a GPU, and on a CPU
    config = config_for({}, kv_cache_dtype_skip_layers=[str(i) for i in native])
    config.model_config.max_model_len = config.model_config.original_max_model_len = SCOUT["length"]
    own = patches.unwrapped(patches.planning_module().get_kv_cache_groups)

    def tokens(specs: dict, groups=None) -> int:
        return arithmetic.capacity(config, specs, groups).kv_tokens

    planned = tokens(scout(native), partial(page_plan.grouped, own))
    stock = tokens(scout(list(range(SCOUT["layers"]))))
    assert planned > times * stock
    assert any(f"compressed: {48 - len(native)} of 48 layers, {planned / stock:.1f}x less" in line for line in said), (
        said
    )
    if native:
        assert tokens(scout(native)) < 1.01 * stock
        assert "would save" in said[0]
    blocks = {
        (type(spec), page_plan.is_compressed(spec)): spec.block_size
        for group in page_plan.grouped(own, config, scout(native))
        for spec in [group.kv_cache_spec]
    }
    # vLLM looks prefixes up in chunks only where no other block is longer, or does not divide the chunks' one.
    own_block = blocks[ChunkedLocalAttentionSpec, True]
    assert SCOUT["chunk"] % own_block == 0 and all(own_block % size == 0 for size in blocks.values())
    assert (ChunkedLocalAttentionSpec, False) not in blocks


def test_chunks_are_full_where_vllm_plans_without_kinds(said):
    config = config_for({})
    config.scheduler_config.disable_hybrid_kv_cache_manager = True
    own = patches.unwrapped(patches.planning_module().get_kv_cache_groups)
    groups = page_plan.grouped(own, config, scout([0, 1, 46, 47]))
    assert len(groups) == 1 and "one group, pages of their own sizes" in said[0]
    assert said[1].startswith("compressed: 44 of 48 layers, 3.")


LIST = coverage.ARGUMENT


@pytest.mark.parametrize(
    ("skip", "options", "specs", "level", "words"),
    [
        ([], {}, [attention(), attention()], logging.INFO, "compressed: 2 of 2 layers, a saving"),
        (["0"], {}, [attention(native=True), attention()], logging.INFO, "native: 0 (vLLM's list of layers to skip)"),
        (["0"], {"skip_layers": [0]}, [attention(native=True), attention()], logging.INFO, f"native: 0 ({LIST})"),
        (
            ["sliding_window"],
            {},
            [attention(native=True, window=64), attention(), attention(native=True, window=64)],
            logging.INFO,
            "native: 0, 2 (vLLM's list",
        ),
        ([], {}, [state(1), attention()], logging.INFO, "1 of 1 layers, a saving; 1 holds a state"),
        # What nobody asked for.
        ([], {}, [attention(native=True), attention()], logging.WARNING, "native: 0 (this model's code does not give"),
        (["0"], {}, [attention(native=True)], logging.WARNING, "has no effect on this engine: set additional_config"),
        ([], {}, [attention(native=True)], logging.WARNING, "has no effect on this engine: use --kv-cache-dtype auto"),
        ([], {}, [state(1)], logging.WARNING, "compressed: 0 of 0 layers"),
        (["0"], {"skip_layers": [0]}, [state(1), attention()], logging.WARNING, f"{LIST} names 0, and no layer"),
        (
            ["sliding_window"],
            {"skip_layers": ["sliding_window"]},
            [attention()],
            logging.WARNING,
            f"{LIST} names sliding_window, and no layer",
        ),
    ],
)
def test_what_is_compressed_is_said_against_what_was_asked(skip, options, specs, level, words):
    specs = {f"model.layers.{i}.attn": spec for i, spec in enumerate(specs)}
    config = config_for(specs, kv_cache_dtype_skip_layers=skip)
    config.additional_config = {"turboquant": options}
    found, text = coverage.line(config, specs, "a saving")
    assert found == level and words in text, text
    config.additional_config = {"turboquant": options | {"strict": True}}
    if level == logging.INFO:
        assert coverage.line(config, specs, "a saving") == (found, text)
        return
    with pytest.raises(ValueError, match="tq-backend, strict: compressed: ") as error:
        coverage.line(config, specs, "a saving")
    assert words in str(error.value)


def test_a_pipeline_stage_is_not_taken_for_the_engine(monkeypatch):
    """Its worker groups its own layers; the engine, which groups all, decides."""
    from vllm.distributed import parallel_state

    specs = numbered(attention(native=True))
    config = config_for(specs, kv_cache_dtype_skip_layers=["0"])
    config.additional_config = {"turboquant": {"strict": True}}
    config.parallel_config.pipeline_parallel_size = 2
    with pytest.raises(ValueError, match="has no effect"):
        coverage.line(config, specs, "")
    monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: True)
    assert coverage.line(config, specs, "")[0] == logging.INFO


def test_an_engine_that_asks_gets_the_line_whatever_its_layers_are(monkeypatch):
    """From the wrap around the engine's grouping: no layer of this one is compressed."""
    lines = []
    monkeypatch.setattr(page_plan, "say", lambda level, line: lines.append((level, line)))
    register()
    specs = numbered(attention(native=True), attention(native=True))
    config = config_for(specs)
    assert patches.planning_module().get_kv_cache_groups(config, specs)
    assert [level for level, _ in lines] == [logging.WARNING] and "compressed: 0 of 2 layers" in lines[0][1]
    config.cache_config.cache_dtype = "auto"
    assert patches.planning_module().get_kv_cache_groups(config, specs)
    assert len(lines) == 1


def test_an_engine_that_changed_keeps_its_own_planning(said):
    config = config_for({})
    del config.max_in_flight_tokens
    own = patches.unwrapped(patches.planning_module().get_kv_cache_groups)
    assert page_plan.grouped(own, config, numbered(attention(), attention()))
    assert "leaves the page sizes to vLLM: AttributeError: " in said[0]


def test_a_backend_that_the_model_chose_is_not_run_over_our_pages():
    specs = numbered(attention(), attention(state_content_bytes=None))
    with pytest.raises(NotImplementedError, match="another attention backend for 1, which cannot read"):
        grouped(specs)


def test_layers_without_any_plan_are_named(said):
    def no_groups(vllm_config, specs):
        raise NotImplementedError("the page sizes cannot be unified")

    specs = numbered(state(1 << 40), attention())
    with pytest.raises(ValueError, match="there are no pages for these layers") as error:
        page_plan.grouped(no_groups, config_for(specs), specs)
    for words in ("layers 0 hold a state of up to 1099511627776 bytes", "cannot be unified", "--kv-cache-dtype auto"):
        assert words in str(error.value)


def test_vllms_guess_of_one_page_size_is_not_made_for_our_caches():
    """From the first layer's backend, before any layer is known; see the ledger."""
    from vllm.platforms.interface import Platform

    asked = []
    backend = SimpleNamespace(customize_spec=lambda spec: asked.append(spec) or spec)
    register()
    for dtype, served in ((DTYPE, True), ("fp8", False)):
        model = SimpleNamespace(dtype=torch.bfloat16, get_num_kv_heads=lambda _: 2, get_head_size=lambda: 64)
        cache = SimpleNamespace(cache_dtype=dtype, kv_cache_dtype_skip_layers=["0"])
        config = SimpleNamespace(cache_config=cache, model_config=model, parallel_config=None)
        with contextlib.nullcontext() if served else pytest.raises(AttributeError):  # vLLM's own reads more of it
            Platform._align_heterogeneous_kv_block_size(config, backend)
        assert bool(asked) != served


@pytest.mark.parametrize("name", MODELS)
def test_published_models_get_the_planners_pages(name, said, monkeypatch):
    """From the specs that the engine's layers make, through the adapter, to the tokens that the engine counts."""
    monkeypatch.setattr(page_plan, "CPU_KERNEL_BLOCK", 16)  # as on a GPU
    row = MODELS[name]
    memory = row["memory_gib"] * GIB
    found = plan(row["config"], DTYPE, 16, memory, tp=row["tp"])
    counted = arithmetic.adapted_capacity(
        row["config"], DTYPE, memory, tp=row["tp"], max_model_len=found["max_model_len"], in_flight_tokens=IN_FLIGHT_TOKENS
    )  # fmt: skip
    assert (counted.kv_tokens, counted.num_groups) == (found["kv_tokens"], found["num_groups"])
    assert any("plans pages" in line for line in said)
