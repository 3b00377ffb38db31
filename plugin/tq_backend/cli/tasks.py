"""What a model still does with a compressed cache: find a key in a long prompt, and continue as it would have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tq_backend.cli.heldout import load_tokenizer, retrieval_prompt

ANSWER_TOKENS = 12  # seven digits, in a token each
GREEDY_TOKENS = 200


def generated(engine: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Greedy, past an end of text."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    outputs = engine.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def keys_found(engine: Any, model: Path, length: int, keys: int) -> int:
    """Of so many prompts of `length` tokens, how many are answered with their key."""
    prompts = [retrieval_prompt(model, key, length) for key in range(keys)]
    answers = generated(engine, [tokens for tokens, _ in prompts], ANSWER_TOKENS)
    texts = [load_tokenizer(model).decode(answer) for answer in answers]
    return sum(secret in text for text, (_, secret) in zip(texts, prompts, strict=True))


def agreeing(base: list[list[int]], ours: list[list[int]]) -> float:
    """Mean number of tokens before the first that differs."""
    lengths = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in zip(base, ours, strict=True)
    ]
    return sum(lengths) / len(lengths)
