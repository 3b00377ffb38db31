"""The text that quality is measured on: the source of the installed `anyio` package, which tiny-code-lm was not trained on,
and key-retrieval prompts of the kind it was."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

END_OF_FILE = 0  # the model's end-of-text token


def load_tokenizer(model: Path):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(model / "tokenizer.json"))


def heldout_tokens(model: Path, count: int) -> list[int]:
    """The first `count` tokens of anyio's .py files in sorted order, each followed by token 0."""
    spec = importlib.util.find_spec("anyio")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(
            "the held-out text is the source of the package anyio, which is not installed (vLLM needs it too)"
        )
    root = Path(spec.submodule_search_locations[0])
    tokenizer = load_tokenizer(model)
    tokens: list[int] = []
    for path in sorted(root.rglob("*.py")):
        tokens += [*tokenizer.encode(path.read_text(encoding="utf-8")).ids, END_OF_FILE]
        if len(tokens) >= count:
            return tokens[:count]
    raise RuntimeError(f"anyio's source has {len(tokens)} tokens; {count} were asked for")


NAMES = ("river", "window", "garden", "silver", "planet", "bridge", "forest", "candle")


def retrieval_prompt(model: Path, key: int, length: int) -> tuple[list[int], str]:
    """A prompt of at most `length` tokens with a secret key inside held-out code, and the digits that answer it."""
    rng = random.Random(key)
    secret = str(rng.randrange(1_000_000, 10_000_000))
    name = NAMES[key % len(NAMES)]
    tokenizer = load_tokenizer(model)
    fact = tokenizer.encode(f"# The secret key of {name} is {secret}.\n").ids
    question = tokenizer.encode(f"\n# Question: what is the secret key of {name}? Answer:").ids
    filler = heldout_tokens(model, length - len(fact) - len(question))
    at = rng.randrange(len(filler) // 8, len(filler) * 7 // 8)
    return filler[:at] + fact + filler[at:] + question, secret
