"""Two worker processes, each with the pages of its own KV heads, give what one process with all of them gives."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import tiny_models
from engines import largest_difference, observe_rounds, raw_pages, running
from tiny_models import prompt

DTYPE = "turboquant_4bit_nc"
CONTEXT = 256
OPTIONS = {"dtype": "float32", "block_size": 32, "skip_tokenizer_init": True, "enable_prefix_caching": True}
FIRST = prompt(90, seed=1)
ROUNDS = [FIRST, prompt(17, seed=2)], [FIRST[:64] + prompt(30, seed=3), prompt(1, seed=4)]

FLOAT_PAGES = """
from tq_backend.vllm_adapter import formats

def install():
    formats.page_format = lambda _dtype: "raw_f32"
"""


@pytest.fixture
def float_pages_in_workers(tmp_path, monkeypatch):
    """Workers are spawned, so raw_pages() does not reach them; a plugin of vLLM's does."""
    info = tmp_path / "float_pages-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: float-pages\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nfloat_pages = float_pages:install\n")
    (tmp_path / "float_pages.py").write_text(FLOAT_PAGES)
    monkeypatch.syspath_prepend(tmp_path)


def test_pages_are_split_by_kv_head(tmp_path, monkeypatch, float_pages_in_workers):
    """With floats in the pages: two workers add in another order than one process, and a code at a tie would move."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("vLLM binds each worker to a core of its own, and this process may use one")
    model = tiny_models.make("llama", tmp_path)
    with raw_pages(), running(DTYPE, model=model, context=CONTEXT, **OPTIONS) as engine:
        alone = observe_rounds(engine, *ROUNDS)

    from vllm import LLM

    # vLLM's own binding wants a NUMA node for each worker.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[1]}")
    with raw_pages():
        llm = LLM(
            model=str(model),
            enforce_eager=True,
            max_model_len=CONTEXT,
            tensor_parallel_size=2,
            distributed_executor_backend="mp",
            attention_backend="TURBOQUANT",
            kv_cache_dtype=DTYPE,
            additional_config={"turboquant": {"skip_layers": []}},
            **OPTIONS,
        )
        try:
            specs = [spec for worker in llm.collective_rpc("get_kv_cache_spec") for spec in worker.values()]
            split = observe_rounds(SimpleNamespace(llm=llm), *ROUNDS)
        finally:
            llm.llm_engine.engine_core.shutdown()
    # 6 layers in each worker, and in each layer one of the model's two KV heads.
    assert [(spec.kv_quant_mode.name.lower(), spec.num_kv_heads) for spec in specs] == [(DTYPE, 1)] * 12
    assert split.hit_tokens == alone.hit_tokens > 0
    print("difference", largest_difference(alone, split))
    assert split.tokens == alone.tokens
    assert largest_difference(alone, split) < 1e-4
