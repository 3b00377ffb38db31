"""Real vLLM engines in this process, one after another, and two test-only caches for comparison."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tq_backend._library import native
from tq_backend.cli.engine import Engine

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "tiny-code-lm"
CONTEXT = 1024
GENERATED = 8


@contextmanager
def running(kv_format: str | None, model: Path = MODEL, context: int = CONTEXT, **options) -> Iterator[Engine]:
    engine = Engine(model, kv_format, context, **options)
    try:
        yield engine
    finally:
        engine.close()


def attention_layers(engine: Engine) -> list[torch.nn.Module]:
    """vLLM's attention layers in the model's order."""
    from vllm.model_executor.layers.attention import Attention

    return [module for module in engine.model.modules() if isinstance(module, Attention)]


@contextmanager
def raw_pages() -> Iterator[None]:
    """Floats in the same pages on the same path (format raw_f32), whatever cache dtype is asked for."""
    from tq_backend.vllm_adapter import formats

    own = formats.page_format
    formats.page_format = lambda _dtype: "raw_f32"
    try:
        yield
    finally:
        formats.page_format = own


def through_codec(kv_format: str, x: torch.Tensor, is_key: bool) -> torch.Tensor:
    """What the host reference codec makes of [tokens, heads, head_dim]."""
    rows = native().fake_quantize(kv_format, "key" if is_key else "value", x.float().reshape(-1, x.shape[-1]).numpy())
    return torch.from_numpy(rows).reshape(x.shape).to(x.dtype)


@contextmanager
def patched_store(store) -> Iterator[None]:
    """store(own, self, layer, key, value, kv_cache, slot_mapping) in place of the layer's own do_kv_cache_update."""
    from tq_backend.vllm_adapter.impl import TurboQuantImpl

    own = TurboQuantImpl.do_kv_cache_update
    TurboQuantImpl.do_kv_cache_update = lambda self, *args: store(own, self, *args)
    try:
        yield
    finally:
        TurboQuantImpl.do_kv_cache_update = own


@contextmanager
def recorded_codec(kv_format: str, record: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Runs the engine as it is, and notes what the reference codec makes of every K and V that it stores."""

    def store(own, self, layer, key, value, kv_cache, slot_mapping):
        record.append((through_codec(kv_format, key, True), through_codec(kv_format, value, False)))
        own(self, layer, key, value, kv_cache, slot_mapping)

    with patched_store(store):
        yield


@contextmanager
def replayed_float_cache(kv_format: str, record: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[list[float]]:
    """raw_pages() holding the recorded K and V, call by call. Yields a list that gets, per call, the share of elements in
    which this engine's own K and V would have read back differently."""
    calls = iter(record)
    moved: list[float] = []

    def store(own, self, layer, key, value, kv_cache, slot_mapping):
        recorded = next(calls)
        mine = (through_codec(kv_format, key, True), through_codec(kv_format, value, False))
        # Half a step of the finest codec here is far above 1e-2 of a row's largest element; float noise is far below.
        for a, b in zip(mine, recorded, strict=True):
            moved.append(((a - b).abs() > 1e-2 * b.abs().amax(-1, keepdim=True)).float().mean().item())
        own(self, layer, *recorded, kv_cache, slot_mapping)

    with patched_store(store), raw_pages():
        yield moved
    assert next(calls, None) is None, "both engines must make the same calls"


@dataclass
class Seen:
    """What an engine said: log probabilities of given prompt tokens, and of its own greedy tokens."""

    prompt: list[float] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)  # their tokens
    tokens: list[list[int]] = field(default_factory=list)
    generated: list[list[float]] = field(default_factory=list)
    hit_tokens: int = 0  # prompt tokens of the second round that came from the prefix cache


def observe_rounds(engine: Engine, first_round: list, second_round: list, generated: int = GENERATED) -> Seen:
    """Greedy generation for the prompts of two batches, the second after the first is done. A prompt is a list of tokens, or what
    vLLM takes for one with images."""
    from vllm import SamplingParams

    seen = Seen()

    def generate(batch: list, **more) -> None:
        params = SamplingParams(
            temperature=0, max_tokens=generated, ignore_eos=True, detokenize=False, logprobs=0, **more
        )
        prompts = [p if isinstance(p, dict) else {"prompt_token_ids": p} for p in batch]
        for output in engine.llm.generate(prompts, params, use_tqdm=False):
            tokens = output.prompt_token_ids  # an image's placeholders are filled in
            seen.prompts.append(list(tokens))
            if output.prompt_logprobs:
                seen.prompt += [output.prompt_logprobs[i][tokens[i]].logprob for i in range(1, len(tokens))]
            seen.hit_tokens += output.num_cached_tokens or 0
            ids = list(output.outputs[0].token_ids)
            seen.tokens.append(ids)
            seen.generated.append([output.outputs[0].logprobs[i][ids[i]].logprob for i in range(generated)])

    generate(first_round, prompt_logprobs=0)
    seen.hit_tokens = 0
    generate(second_round)
    return seen


def largest_difference(a: Seen, b: Seen) -> float:
    """Over prompt tokens, and over generated ones as long as both engines chose the same. NaN if any log probability is."""
    pairs = list(zip(a.prompt, b.prompt, strict=True))
    for ids_a, ids_b, p, q in zip(a.tokens, b.tokens, a.generated, b.generated, strict=True):
        for i in range(len(ids_a)):
            if ids_a[i] != ids_b[i]:
                break
            pairs.append((p[i], q[i]))
    return float(torch.tensor([x - y for x, y in pairs], dtype=torch.float64).abs().max())
