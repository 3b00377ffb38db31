"""A real vLLM engine over our pages: exact with floats in them, and as good as the reference codec with codes in them."""

from __future__ import annotations

import pytest
from engines import (
    MODEL,
    Seen,
    attention_layers,
    largest_difference,
    observe_rounds,
    raw_pages,
    recorded_codec,
    replayed_float_cache,
    running,
)
from stock_attention import prefill_route
from tq_backend.cli.engine import Engine, counters
from tq_backend.cli.heldout import heldout_tokens
from tq_backend.vllm_adapter.options import format_names
from tq_backend.vllm_adapter.prefill_plan import Limits

# Chunked prefill (700 tokens in chunks of 256, mixed with decodes), prefix hits in pages of 128.
OPTIONS = {"dtype": "float32", "max_num_batched_tokens": 256, "enable_prefix_caching": True}


def prompts() -> list[list[int]]:
    text = heldout_tokens(MODEL, 4000)
    return [text[:700], text[1000:1017], text[2000:2130], text[3000:3001]]


def observe(engine: Engine) -> Seen:
    # The second round shares 512 tokens with the first prompt: a prefix hit in a batch with fresh prompts and decodes.
    first = prompts()[0]
    return observe_rounds(engine, prompts(), [first[:512] + prompts()[2], prompts()[1] * 3, first[:690]])


def test_float_pages_equal_the_stock_engine():
    with running(None, **OPTIONS) as engine:
        before = counters()
        stock = observe(engine)
        assert counters() == before, "the stock engine must not run our kernels"
    with raw_pages(), running("turboquant_4bit_nc", **OPTIONS) as engine:
        before = counters()["attend_calls"]
        ours = observe(engine)
        assert counters()["attend_calls"] > before
    # The prefill route, as on a GPU, with pieces that are smaller than the longest prefixes.
    raw = {"turboquant": {"skip_layers": [], "current": "raw"}}
    with (
        raw_pages(),
        prefill_route(Limits(384, 200)) as runs,
        running("turboquant_4bit_nc", **OPTIONS, additional_config=raw) as engine,
    ):
        routed = observe(engine)
        # All prompt tokens but those of chunks of 16 and less, which count as decodes.
        assert sum(runs) // engine.num_layers > 700 + 17 + 130
    assert stock.tokens == ours.tokens == routed.tokens
    for seen in (ours, routed):
        assert seen.hit_tokens >= 2 * 512
        # Two float32 implementations of one attention; 7.6e-6 was seen with one written in PyTorch.
        assert largest_difference(seen, stock) < 1e-4


@pytest.mark.parametrize("name", format_names())
def test_compressed_pages_equal_the_reference_codec(name):
    """Against the same engine with a float cache that holds what the reference codec makes of the same K and V.

    The float cache gets the K and V of the compressed run. If it quantized its own, a difference of 1e-6 would move a code at a
    tie, that code the next layer by 1e-3, and so hundreds of codes there: two runs of one codec then differ by 0.3 to 0.9 in
    their worst log probability, which says nothing about either. How often its own codes would have differed is bounded too.
    """
    record = []
    with recorded_codec(name, record), running(name, **OPTIONS) as engine:
        ours = observe(engine)
    with replayed_float_cache(name, record) as moved, running(name, **OPTIONS) as engine:
        reference = observe(engine)
    assert ours.hit_tokens >= 2 * 512
    assert ours.tokens == reference.tokens
    assert largest_difference(ours, reference) < 0.02
    # One code that moves at a tie shifts its whole key a little, once it is rotated back: 0.3 % was seen.
    assert sum(moved) / len(moved) < 1e-2


def test_skip_layers_default_keeps_boundary_layers_native():
    """Without skip_layers vLLM keeps the first and last two layers native; both kinds of layer work side by side."""
    with running("turboquant_4bit_nc", **OPTIONS, additional_config={}) as engine:
        before = counters()
        observe(engine)
        calls = counters()["attend_calls"] - before["attend_calls"]
        kinds = [layer.impl.kv_cache_dtype for layer in attention_layers(engine)]
    assert kinds == ["auto", "auto", "turboquant_4bit_nc", "turboquant_4bit_nc", "auto", "auto"]
    assert calls > 0


def test_unknown_option_is_refused_with_the_nearest_name():
    with pytest.raises(Exception, match="did you mean 'skip_layers'"):
        Engine(MODEL, "turboquant_4bit_nc", 256, additional_config={"turboquant": {"skip_layer": []}})
