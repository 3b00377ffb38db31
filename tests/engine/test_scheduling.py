"""How the engine cuts and orders its work changes no output: chunks, mixed batches, prefix hits, preemption, speculation."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path

import pytest
import tiny_models
from engines import Seen, largest_difference, observe_rounds, raw_pages, running
from tiny_models import prompt
from tq_backend.cli.engine import Engine
from vllm.v1.core.sched.scheduler import Scheduler

CONTEXT = 256
DTYPE = "turboquant_4bit_nc"
BLOCK_SIZE = 32
OPTIONS = {"dtype": "float32", "context": CONTEXT, "block_size": BLOCK_SIZE, "skip_tokenizer_init": True}
ALONE = {"max_num_seqs": 1}  # one prompt after the other, each in one piece
BUSY = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 48,  # prefills in chunks, beside decodes
    "enable_prefix_caching": True,
    "num_gpu_blocks_override": 14,
}
# With floats in the pages, what two shapes of one matrix product differ by. With codes, one of them may move a code at a tie;
# see test_engine.py.
TOLERANCE = {"raw_f32": 1e-4, DTYPE: 0.02}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.make("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture
def preempted(monkeypatch) -> list[str]:
    """The requests that the scheduler took out of the batch."""
    requests: list[str] = []
    own = Scheduler._preempt_request

    def noted(self, request, *args, **kwargs):
        requests.append(request.request_id)
        return own(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", noted)
    return requests


def observe(engine: Engine) -> Seen:
    """Four prompts that want 16 pages of 13 before they are done; then a prefix hit beside fresh prompts."""
    first = [prompt(90 + i, seed=i) for i in range(4)]
    return observe_rounds(
        engine, first, [prompt(30, seed=5), first[3] + prompt(40, seed=6), prompt(61, seed=7)], generated=32
    )


@pytest.mark.parametrize("pages", TOLERANCE)
def test_chunks_mixed_batches_prefix_hits_and_preemption(pages, llama, preempted):
    pages_of = raw_pages if pages == "raw_f32" else nullcontext
    with pages_of(), running(DTYPE, model=llama, **OPTIONS, **ALONE) as engine:
        alone = observe(engine)
    assert alone.hit_tokens == 0 and not preempted
    with pages_of(), running(DTYPE, model=llama, **OPTIONS, **BUSY) as engine:
        busy = observe(engine)
    print("preempted", preempted, "hits", busy.hit_tokens, "difference", largest_difference(alone, busy))
    assert preempted
    assert busy.hit_tokens >= 2 * BLOCK_SIZE
    assert busy.tokens == alone.tokens
    assert largest_difference(alone, busy) < TOLERANCE[pages]


def drafted(engine: Engine) -> tuple[int, int]:
    """Tokens that were drafted and that were accepted."""
    values = {metric.name: getattr(metric, "value", 0) for metric in engine.llm.get_metrics()}
    return values["vllm:spec_decode_num_draft_tokens"], values["vllm:spec_decode_num_accepted_tokens"]


REPEATING = prompt(20, seed=8) * 5
ROUNDS = [REPEATING, prompt(90, seed=9)], [prompt(150, seed=10), REPEATING[:70]]


def speculate(model: Path) -> dict[str, tuple[Seen, int, int]]:
    """By method, what was seen, and how many tokens were drafted and accepted."""
    draft = {"method": "draft_model", "model": str(model), "max_model_len": CONTEXT + 1}
    ngram = {"method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    out = {}
    for method in (draft, ngram):
        config = method | {"num_speculative_tokens": 3}
        with running(DTYPE, model=model, **OPTIONS, speculative_config=config, disable_log_stats=False) as engine:
            out[method["method"]] = (observe_rounds(engine, *ROUNDS), *drafted(engine))
    return out


def test_speculation_changes_no_greedy_token(llama):
    """A draft by the model itself is mostly accepted, the n-grams of a model with random weights are rejected.

    In a process of its own: proposing n-grams imports numba, and vLLM's search for Triton kernels among all loaded modules then
    stumbles over one of its objects when a next engine starts.
    """
    with running(DTYPE, model=llama, **OPTIONS) as engine:
        plain = observe_rounds(engine, *ROUNDS)
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        found = process.submit(speculate, llama).result()
    for method, (seen, drafts, accepted) in found.items():
        print(method, "drafted", drafts, "accepted", accepted, "difference", largest_difference(plain, seen))
        assert seen.tokens == plain.tokens
        assert largest_difference(plain, seen) < TOLERANCE[DTYPE]
    assert found["draft_model"][2] > 0
    assert found["ngram"][1] > found["ngram"][2]
