"""What one layer hands to the kernels means what vLLM means: windows, soft caps, ALiBi, sinks, cache layouts, shared caches; and
which part of a batch goes which way.

The small model has none of these, so an engine run would not notice a window that is one too short. Here one layer of ours over
float pages (raw_f32) meets vLLM's stock CPU kernel over its own float cache, on the same numbers.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import stock_attention
import torch
from engines import raw_pages
from tq_backend._library import native, torch_ops
from tq_backend.vllm_adapter import metadata as metadata_module
from tq_backend.vllm_adapter.impl import TurboQuantImpl
from tq_backend.vllm_adapter.metadata import (
    TurboQuantMetadata,
    TurboQuantMetadataBuilder,
    check_shared_caches,
    plan_prefill,
)
from tq_backend.vllm_adapter.prefill import PrefillRoute
from tq_backend.vllm_adapter.prefill_plan import Geometry, Limits, workspace_size
from tq_backend.vllm_adapter.spans import spans_of_batch

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 8, 2, 64, 32
SCALE = HEAD_DIM**-0.5
QUERY_LENS = [1, 17, 40]  # a decode, a fresh prompt, a chunk behind 60 cached tokens
SEQ_LENS = [70, 17, 100]
MAX_BLOCKS = 4
# Both sides compute in float32 over at most 100 tokens: 4e-6 was seen. The smallest of these mistakes (one token more or less in
# a window, an option not passed on) moves the output by more than 1.
TOLERANCE = 3e-5
SLOPES = [2.0 ** -(h + 1) for h in range(HEADS)]
SINKS = [0.5 * h - 1.0 for h in range(HEADS)]


def block_table() -> torch.Tensor:
    return torch.arange(len(SEQ_LENS) * MAX_BLOCKS, dtype=torch.int32).flip(0).view(len(SEQ_LENS), MAX_BLOCKS)


def slots() -> torch.Tensor:
    return torch.cat(
        [
            row.long()[torch.arange(n) // BLOCK_SIZE] * BLOCK_SIZE + torch.arange(n) % BLOCK_SIZE
            for row, n in zip(block_table(), SEQ_LENS, strict=True)
        ]
    )


@pytest.fixture(scope="module")
def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    query = torch.randn(sum(QUERY_LENS), HEADS, HEAD_DIM, generator=generator) * 2
    key = torch.randn(sum(SEQ_LENS), KV_HEADS, HEAD_DIM, generator=generator)
    return query, key, torch.randn(sum(SEQ_LENS), KV_HEADS, HEAD_DIM, generator=generator)


def stock(tensors, causal: bool = True, **options) -> torch.Tensor:
    """CPUAttentionBackendImpl's own calls, with what its constructor makes of the same options."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    query, key, value = tensors
    isa = _get_attn_isa(torch.float32, BLOCK_SIZE, HEAD_DIM)
    blocks = len(SEQ_LENS) * MAX_BLOCKS
    cache = torch.zeros(blocks, KV_HEADS, BLOCK_SIZE * 2, HEAD_DIM).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(key, value, *cache, slots(), isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto")
    start = torch.tensor([0, 1, 18, 58], dtype=torch.int32)
    lens = torch.tensor(SEQ_LENS, dtype=torch.int32)
    window = options.get("sliding_window") or -1
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(SEQ_LENS), num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, seq_lens=lens, dtype=torch.float32,
        query_start_loc=start, causal=causal, sliding_window_size=window, isa=isa, enable_kv_split=True, dynamic_causal=None,
        kv_cache_dtype="auto",
    )  # fmt: skip
    slopes = options.get("alibi_slopes")
    out = torch.empty_like(query)
    ops.cpu_attention_with_kv_cache(
        query=query, key_cache=cache[0], value_cache=cache[1], output=out, query_start_loc=start, seq_lens=lens, scale=SCALE,
        causal=causal, alibi_slopes=None if slopes is None else torch.tensor(slopes), sliding_window=window,
        block_table=block_table(), softcap=options.get("logits_soft_cap") or 0.0, scheduler_metadata=plan,
        s_aux=options.get("sinks"),
    )  # fmt: skip
    return out


def empty_cache(layout: str) -> torch.Tensor:
    """vLLM's logical view [blocks, heads, tokens, bytes] of three physical layouts, and one with its axes in another order."""
    blocks, slot = len(SEQ_LENS) * MAX_BLOCKS, 2 * 4 * HEAD_DIM
    if layout == "LBNHC":
        return torch.zeros(blocks, BLOCK_SIZE, KV_HEADS, slot, dtype=torch.uint8).transpose(1, 2)
    if layout == "other axes":
        return torch.zeros(blocks, BLOCK_SIZE, KV_HEADS, slot, dtype=torch.uint8)
    if layout == "LBHNC":
        return torch.zeros(blocks, KV_HEADS, BLOCK_SIZE, slot, dtype=torch.uint8)
    # Blocks that lie further apart than their bytes: a page padded to a larger one, or other layers in between.
    page = KV_HEADS * BLOCK_SIZE * slot
    return torch.zeros(blocks, page + 4096, dtype=torch.uint8)[:, :page].unflatten(1, (KV_HEADS, BLOCK_SIZE, slot))


def layer(**options) -> TurboQuantImpl:
    with raw_pages():
        impl = TurboQuantImpl(HEADS, HEAD_DIM, SCALE, KV_HEADS, kv_cache_dtype="turboquant_4bit_nc", **options)
        impl.set_pages(HEAD_DIM, BLOCK_SIZE)  # the metadata builder does it
    impl.process_weights_after_loading(torch.float32)  # vLLM's loader calls it for each attention layer
    return impl


def metadata(causal: bool = True, images: dict | None = None) -> TurboQuantMetadata:
    raw = native().format_by_name("raw_f32")["format_id"]
    size = torch_ops().workspace_size(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM, raw)
    return TurboQuantMetadata(
        num_actual_tokens=sum(QUERY_LENS),
        query_start_loc=torch.tensor([0, 1, 18, 58], dtype=torch.int32),
        seq_lens=torch.tensor(SEQ_LENS, dtype=torch.int32),
        block_table=block_table(),
        slot_mapping=slots(),
        causal=causal,
        max_query_len=max(QUERY_LENS),
        workspace=torch.zeros(size, dtype=torch.uint8),
        route_workspace=torch.zeros(0, dtype=torch.uint8),
        mm_prefix_range_tensor=spans_of_batch(images, len(SEQ_LENS), torch.device("cpu")),
    )


def ours(tensors, layout: str = "LBHNC", causal: bool = True, images: dict | None = None, **options) -> torch.Tensor:
    query, key, value = tensors
    impl, cache, out = layer(**options), empty_cache(layout), torch.empty_like(query)
    impl.do_kv_cache_update(None, key, value, cache, slots())
    return impl.forward(None, query, None, None, cache, metadata(causal, images), out)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sliding_window": 1},
        {"sliding_window": 16},
        {"sliding_window": 33},
        {"logits_soft_cap": 5.0},
        {"alibi_slopes": SLOPES},
        {"sinks": torch.tensor(SINKS)},
        {"sliding_window": 24, "logits_soft_cap": 20.0, "sinks": torch.tensor(SINKS)},
        {"causal": False},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_options_mean_what_the_stock_kernel_means(tensors, options):
    torch.testing.assert_close(ours(tensors, **options), stock(tensors, **options), rtol=TOLERANCE, atol=TOLERANCE)


# By request, first and last position, as vLLM has them: behind a decode; inside a prompt; one that begins in cached pages, one
# whose end a later chunk brings.
IMAGES = {0: [(10, 30)], 1: [(3, 12)], 2: [(50, 70), (90, 119)]}


def in_double(tensors, window: int, images: dict) -> torch.Tensor:
    """Attention as it is defined, one query at a time."""
    query, key, value = (x.double() for x in tensors)
    out, first_query, first_key = torch.empty_like(query), 0, 0
    for request, (query_len, seq_len) in enumerate(zip(QUERY_LENS, SEQ_LENS, strict=True)):
        k, v = (x[first_key : first_key + seq_len].repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
        token = torch.arange(seq_len)
        for i in range(query_len):
            position = seq_len - query_len + i
            seen = (token <= position) & (token > position - (window or seq_len))
            for first, last in images[request]:
                if first <= position <= last:
                    seen |= (token >= first) & (token <= last)
            score = torch.einsum("hd,thd->ht", query[first_query + i], k) * SCALE
            weight = score.masked_fill(~seen, -torch.inf).softmax(-1)
            out[first_query + i] = torch.einsum("ht,thd->hd", weight, v)
        first_query, first_key = first_query + query_len, first_key + seq_len
    return out


@pytest.mark.parametrize("window", [0, 16])
def test_images_are_seen_in_both_directions(tensors, window):
    """In a decode, a prefill and a chunk; vLLM's stock CPU kernel has no such spans."""
    got = ours(tensors, images=IMAGES, sliding_window=window).double()
    torch.testing.assert_close(got, in_double(tensors, window, IMAGES), rtol=TOLERANCE, atol=TOLERANCE)


def test_spans_of_a_batch():
    device = torch.device("cpu")
    assert spans_of_batch(None, 2, device) is None
    assert spans_of_batch({0: [], 5: [(1, 2)]}, 2, device) is None
    assert spans_of_batch({1: [(3, 12), (20, 20)]}, 2, device).tolist() == [[[0, 0], [0, 0]], [[3, 13], [20, 21]]]
    assert spans_of_batch({0: [(3, 12), (20, 30)]}, 1, device, longest=10).tolist() == [[[3, 13]]]


@pytest.mark.parametrize(("clamped", "spans"), [(False, [[3, 13], [20, 60]]), (True, [[3, 13]])])
def test_the_builder_hands_images_on(monkeypatch, clamped, spans):
    """Gemma 4 clamps an image to the window of a layer; one that is longer is left causal, as vLLM does for other models."""
    a_layer = SimpleNamespace(
        impl=layer(sliding_window=16), head_size_v=HEAD_DIM, mm_prefix_clamp_sliding_window=clamped,
        kv_sharing_target_layer_name=None,
    )  # fmt: skip
    monkeypatch.setattr(metadata_module, "get_layers_from_vllm_config", lambda *_: {"0": a_layer})
    scheduler = SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=1)
    builder = metadata_module.TurboQuantMetadataBuilder(
        SimpleNamespace(state_content_bytes=70, block_size=BLOCK_SIZE),
        ["0"],
        SimpleNamespace(
            scheduler_config=scheduler, additional_config={}, model_config=SimpleNamespace(is_mm_prefix_lm=True)
        ),
        torch.device("cpu"),
    )
    ints = torch.tensor([64], dtype=torch.int32)
    common = SimpleNamespace(
        num_actual_tokens=64, query_start_loc=ints, seq_lens=ints, block_table_tensor=ints, slot_mapping=ints,
        max_query_len=64, causal=True, mm_req_doc_ranges={0: [(3, 12), (20, 59)]},
    )  # fmt: skip
    assert builder.build(0, common).mm_prefix_range_tensor.tolist() == [spans]


def test_sinks_follow_their_weights_in_place(tensors):
    """They are made before weights are loaded, in the model's dtype, and a captured CUDA graph keeps their first address."""
    sinks = torch.nn.Parameter(torch.full((HEADS,), float("nan"), dtype=torch.bfloat16), requires_grad=False)
    impl = layer(sinks=sinks)
    address = impl.kernel_sinks.data_ptr()
    for values in (SINKS, SINKS[::-1]):
        sinks.data.copy_(torch.tensor(values))
        impl.process_weights_after_loading(torch.bfloat16)
        assert impl.kernel_sinks.dtype == torch.float32 and impl.kernel_sinks.data_ptr() == address
        assert impl.kernel_sinks.tolist() == sinks.float().tolist()


@pytest.mark.parametrize("layout", ["LBNHC", "padded", "other axes"])
def test_cache_layouts_give_the_same_bits(tensors, layout):
    assert torch.equal(ours(tensors, layout), ours(tensors, "LBHNC"))


def test_blocks_of_another_size_are_refused(tensors):
    """How many tokens a block has is the spec's word, not a guess from the cache's shape."""
    query, key, value = tensors
    wrong = torch.zeros(len(SEQ_LENS) * MAX_BLOCKS, KV_HEADS, 16, 2 * 4 * HEAD_DIM, dtype=torch.uint8)
    words = r"shape \[12, 2, 16, 512\], 16384 bytes in a block; a block of this layer has 32768"
    with pytest.raises(ValueError, match=words):
        layer().do_kv_cache_update(None, key, value, wrong, slots())
    with pytest.raises(ValueError, match=words):
        layer().forward(None, query, None, None, wrong, metadata(), query)


def test_attend_gets_a_zeroed_workspace_that_the_route_does_not_touch(monkeypatch):
    """Its arrival counters begin at zero and are left at zero, so nothing else may be written between its calls."""
    monkeypatch.setattr(metadata_module.TurboQuantMetadataBuilder, "_workspaces", {})
    a_layer = SimpleNamespace(impl=layer(), head_size_v=HEAD_DIM, kv_sharing_target_layer_name=None)
    monkeypatch.setattr(metadata_module, "get_layers_from_vllm_config", lambda *_: {"0": a_layer})
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=1), speculative_config=None,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1), additional_config={"turboquant": {"current": "raw"}},
        model_config=SimpleNamespace(is_mm_prefix_lm=False, dtype=torch.float32),
    )  # fmt: skip
    limits = Limits(64, 32)
    torch.use_deterministic_algorithms(True)  # torch.empty then gives 255 in each byte
    try:
        with stock_attention.prefill_route(limits):
            builder = metadata_module.TurboQuantMetadataBuilder(
                SimpleNamespace(state_content_bytes=512, block_size=BLOCK_SIZE), ["0"], config, torch.device("cpu")
            )
            batch = builder.build(0, common())
    finally:
        torch.use_deterministic_algorithms(False)
    route = a_layer.impl.prefill_route
    assert batch.workspace.numel() > 0 and batch.workspace.count_nonzero() == 0
    assert batch.route_workspace.numel() == workspace_size(route.geometry, limits)
    assert batch.workspace.untyped_storage().data_ptr() != batch.route_workspace.untyped_storage().data_ptr()


def test_a_layer_that_shares_a_cache_reads_the_targets(tensors):
    """Gemma 3n and 4: `attn(q, None, None)`; vLLM hands the target layer's cache to the sharing one."""
    query, key, value = tensors
    cache = empty_cache("LBHNC")
    layer().do_kv_cache_update(None, key, value, cache, slots())
    sharing = layer(kv_sharing_target_layer_name="model.layers.0.self_attn.attn")
    out = sharing.forward(None, query, None, None, cache, metadata(), torch.empty_like(query))
    assert torch.equal(out, ours(tensors))


def test_a_cache_shared_across_formats_is_refused():
    """The last layers of Gemma 3n read an earlier one's cache; vLLM's boundary skip keeps the last two native."""

    def a_layer(dtype: str, target: str | None = None) -> SimpleNamespace:
        return SimpleNamespace(kv_cache_dtype=dtype, kv_sharing_target_layer_name=target)

    compressed, native_cache = a_layer("turboquant_4bit_nc"), a_layer("auto")
    check_shared_caches(
        {"0": native_cache, "1": compressed, "2": a_layer("turboquant_4bit_nc", "1"), "3": a_layer("auto", "0")}
    )
    for target, sharing in ((compressed, a_layer("auto", "1")), (native_cache, a_layer("turboquant_4bit_nc", "1"))):
        with pytest.raises(NotImplementedError, match=r"both must be skipped or neither"):
            check_shared_caches({"1": target, "2": sharing})


def test_profiling_gives_zeros_and_touches_no_cache(tensors):
    query, key, value = tensors
    out = torch.full_like(query, float("nan"))
    impl, cache = layer(), torch.empty(0, dtype=torch.uint8)
    impl.do_kv_cache_update(None, key, value, cache, slots())
    assert torch.count_nonzero(impl.forward(None, query, key, value, cache, None, out)) == 0


def test_what_is_not_served_is_said(tensors):
    query, key, value = tensors
    with pytest.raises(NotImplementedError, match="attn_type is encoder_only"):
        layer(attn_type="encoder_only")
    with pytest.raises(NotImplementedError, match="output_scale must be None"):
        layer().forward(None, query, key, value, None, metadata(), query, output_scale=torch.ones(1))


def common():
    from vllm.v1.attention.backend import CommonAttentionMetadata

    start = torch.tensor([0, *itertools.accumulate(QUERY_LENS)], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=start, query_start_loc_cpu=start, seq_lens=torch.tensor(SEQ_LENS, dtype=torch.int32),
        num_reqs=len(SEQ_LENS), num_actual_tokens=sum(QUERY_LENS), max_query_len=max(QUERY_LENS), max_seq_len=max(SEQ_LENS),
        block_table_tensor=block_table(), slot_mapping=slots(),
        seq_lens_cpu_upper_bound=torch.tensor(SEQ_LENS, dtype=torch.int32),
    )  # fmt: skip


def routed_layer(limits: Limits, window: int, **options):
    impl = layer(sliding_window=window or None, **options)
    geometry = Geometry(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM, torch.float32, window)
    impl.prefill_route = PrefillRoute(
        impl.ops, impl.format_id, False, geometry, limits, SCALE, stock_attention.attention, stock_attention.merge
    )
    return impl


@pytest.mark.parametrize("window", [0, 24])
@pytest.mark.parametrize("limits", [Limits(64, 1000), Limits(128, 30)])
def test_a_layer_sends_decodes_to_attend_and_prefills_to_the_route(tensors, window, limits):
    """Over float pages, where raw and compressed are the same, so that `attend` alone gives the wanted result."""
    query, key, value = tensors
    sinks = torch.tensor(SINKS)
    impl, cache = routed_layer(limits, window, sinks=sinks), empty_cache("LBHNC")
    impl.do_kv_cache_update(None, key, value, cache, slots())
    # The chunk's rows of the batch are the last ones of each sequence's tokens.
    ends = list(itertools.accumulate(SEQ_LENS))
    current = torch.cat([torch.arange(end - n, end) for end, n in zip(ends, QUERY_LENS, strict=True)])
    batch = metadata()
    plan_prefill(batch, common(), {impl.prefill_route.plan_key}, 16)
    batch.route_workspace = torch.empty(workspace_size(impl.prefill_route.geometry, limits), dtype=torch.uint8)
    assert (batch.num_decodes, batch.num_decode_tokens, batch.max_decode_query_len) == (1, 1, 1)
    before = torch_ops().counters()
    out = impl.forward(None, query, key[current], value[current], cache, batch, torch.empty_like(query))
    after = torch_ops().counters()
    assert after[3] - before[3] == QUERY_LENS[0], "attend serves the decode alone"
    assert impl.prefill_route._buffers.workspace is batch.route_workspace
    wanted = ours(tensors, sliding_window=window or None, sinks=sinks)
    torch.testing.assert_close(out, wanted, rtol=TOLERANCE, atol=TOLERANCE)
    # A layer that reads another one's cache brings no keys: all of it comes from pages.
    shared = impl.forward(None, query, None, None, cache, batch, torch.empty_like(query))
    assert torch.equal(shared, wanted)
    assert torch_ops().counters()[3] - after[3] == 2 * sum(QUERY_LENS)


def test_nothing_is_planned_where_nothing_prefills():
    batch, given, key = metadata(), common(), (0, Limits(64, 1000))
    plan_prefill(batch, given, {key}, 40)  # all chunks count as decodes
    assert batch.plans == {} and batch.num_decodes == 0
    plan_prefill(batch, replace(given, seq_lens_cpu_upper_bound=None), {key}, 16)  # an engine that does not tell
    assert batch.plans == {}
    plan_prefill(batch, given, {(24, Limits(16, 1000))}, 16)  # no room for the window
    assert batch.plans == {}
    # A decode behind prefills: how many of its drafts were accepted, and so its length, is not known on the host.
    start = torch.tensor([0, *itertools.accumulate(QUERY_LENS[::-1])], dtype=torch.int32)
    lens = torch.tensor(SEQ_LENS[::-1], dtype=torch.int32)
    plan_prefill(batch, replace(given, query_start_loc_cpu=start, seq_lens_cpu_upper_bound=lens), {key}, 16)
    assert batch.plans == {}
    plan_prefill(batch, given, {key}, 16)
    assert list(batch.plans) == [key]


def test_layers_get_routes_in_raw_mode_only(monkeypatch):
    """_route_prefill, with what it needs of a builder."""

    def builder(current: str | None) -> SimpleNamespace:
        config = SimpleNamespace(
            additional_config={"turboquant": {"current": current}}, model_config=SimpleNamespace(dtype=torch.float32),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=256),
        )  # fmt: skip
        thresholds: list[int] = []
        return SimpleNamespace(
            vllm_config=config, device=torch.device("cpu"), thresholds=thresholds,
            _init_reorder_batch_threshold=lambda n, supports_spec_as_decode: thresholds.append(n),
        )  # fmt: skip

    limits = Limits(64, 32)
    with stock_attention.prefill_route(limits):
        for current in (None, "compressed"):
            impl, made = layer(), builder(current)
            assert TurboQuantMetadataBuilder._route_prefill(made, [impl]) == 0
            assert impl.prefill_route is None and made.plan_keys == set() and made.thresholds == []
        impls, made = [layer(), layer(sliding_window=24), layer()], builder("raw")
        assert TurboQuantMetadataBuilder._route_prefill(made, impls) == workspace_size(
            impls[0].prefill_route.geometry, limits
        )
    assert made.plan_keys == {(0, limits), (24, limits)} and made.thresholds == [16]
    # Without a stock kernel, here on a CPU, raw is not to be had: said once, and served from pages.
    impls, made = [layer(alibi_slopes=SLOPES), layer()], builder("raw")
    said: list[str] = []
    monkeypatch.setattr("tq_backend.vllm_adapter.metadata.logger.warning", lambda text, *args: said.append(text % args))
    assert TurboQuantMetadataBuilder._route_prefill(made, impls) == 0 and made.plan_keys == set()
    assert len(said) == 1 and "no stock kernel is known for devices of kind cpu" in said[0]
