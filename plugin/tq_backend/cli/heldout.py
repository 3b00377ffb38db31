"""What quality is measured on: windows of text in a model's own tokens, and prompts that hide a key in it.

The text `code` is the source of the installed package anyio, which tiny-code-lm was not trained on; `prose` is a novel.
"""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tq_backend.cli.prose import novel

CODE, PROSE = "code", "prose"
NOVEL = "Persuasion"


@cache
def load_tokenizer(model: Path):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(model / "tokenizer.json"))


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def plain(model: Path, text: str) -> list[int]:
    """A text's tokens and nothing that a tokenizer puts before or behind."""
    return load_tokenizer(model).encode(text, add_special_tokens=False).ids


def beginning(model: Path) -> list[int]:
    """What the tokenizer puts before a text: <bos>, or nothing. A model that was trained with it reads badly without."""
    bare, full = plain(model, "a"), load_tokenizer(model).encode("a").ids
    for i in range(len(full) - len(bare) + 1):
        if full[i : i + len(bare)] == bare and i > 0:
            return full[:i]
    config = read_json(model / "tokenizer_config.json")
    if not config.get("add_bos_token"):
        return []
    token = config.get("bos_token")
    found = load_tokenizer(model).token_to_id(token["content"] if isinstance(token, dict) else str(token))
    return [] if found is None else [found]


def end_of_file(model: Path) -> list[int]:
    """The model's end of text, or nothing. Of several the lowest: ends of a chat's turns were added behind it."""
    config = read_json(model / "config.json")
    found = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
    if found is None:
        return []
    return [min(found)] if isinstance(found, list) else [found]


def files_of(text: str) -> list[Path]:
    """Of a text that is no word: a file, or a folder's files in sorted order. Raises ValueError if there are none."""
    path = Path(text)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        raise ValueError(
            f"--text {text}: there is no such file and no files in such a folder; the words are {CODE} and {PROSE}"
        )
    return files


def code_files() -> list[Path]:
    spec = importlib.util.find_spec("anyio")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "the text 'code' is the source of the package anyio, which is not installed (vLLM needs it too)"
        )
    return sorted(Path(spec.submodule_search_locations[0]).rglob("*.py"))


def pieces(text: str) -> Iterator[str]:
    if text == PROSE:
        yield novel(NOVEL)
        return
    for path in code_files() if text == CODE else files_of(text):
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text in UTF-8: {error}") from error


def heldout_tokens(model: Path, count: int, text: str = CODE) -> list[int]:
    """The first `count` tokens of a text's files, each followed by the model's end of text. Raises ValueError if there are fewer."""
    tokens: list[int] = []
    for piece in pieces(text):
        tokens += [*plain(model, piece), *end_of_file(model)]
        if len(tokens) >= count:
            return tokens[:count]
    raise ValueError(f"the text {text!r} has {len(tokens)} tokens; {count} were asked for")


def windows_of(model: Path, text: str, number: int, length: int) -> list[list[int]]:
    """Consecutive pieces of a text, each behind the tokenizer's own beginning, which counts into `length`."""
    begin = beginning(model)
    inside = length - len(begin)
    if inside < 1:
        raise ValueError(
            f"windows of {length} tokens have no place behind the {len(begin)} that the tokenizer begins with"
        )
    tokens = heldout_tokens(model, number * inside, text)
    return [begin + tokens[i * inside : (i + 1) * inside] for i in range(number)]


NAMES = ("river", "window", "garden", "silver", "planet", "bridge", "forest", "candle")


def retrieval_prompt(model: Path, key: int, length: int) -> tuple[list[int], str]:
    """A prompt of `length` tokens with a secret key inside held-out code, and the digits that answer it."""
    rng = random.Random(key)
    secret = str(rng.randrange(1_000_000, 10_000_000))
    name = NAMES[key % len(NAMES)]
    begin = beginning(model)
    fact = plain(model, f"# The secret key of {name} is {secret}.\n")
    question = plain(model, f"\n# Question: what is the secret key of {name}? Answer:")
    room = length - len(begin) - len(fact) - len(question)
    if room < 16:
        raise ValueError(
            f"a prompt of {length} tokens is too short to hide a key in; it must have {length - room + 16} or more"
        )
    filler = heldout_tokens(model, room)
    at = rng.randrange(len(filler) // 8, len(filler) * 7 // 8)
    return begin + filler[:at] + fact + filler[at:] + question, secret
