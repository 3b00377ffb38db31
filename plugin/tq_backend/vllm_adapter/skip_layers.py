"""The list of layers that keep the native cache, and its check.

vLLM compares the text of each entry with a layer's number and with the one kind that it knows. An entry that is neither skips
nothing, without a word: the layer that it should have kept native is compressed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

KINDS = ("sliding_window",)
NUMBER = re.compile(r"-?\d{1,18}", re.ASCII)  # longer ones are no layer's, and Python may refuse to read them


def num_layers(vllm_config: Any) -> int:
    """Of the model, and of a draft model, whose layers are numbered behind the model's."""
    model = vllm_config.model_config.hf_text_config.num_hidden_layers
    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    return model + (0 if draft is None else getattr(draft.hf_text_config, "num_hidden_layers", 0))


def checked(entries: Iterable[str], layers: int, argument: str) -> list[str]:
    """The entries as vLLM compares them. Raises ValueError with a sentence that names the argument."""
    allowed = f"it takes layer numbers from 0 to {layers - 1} and {' and '.join(map(repr, KINDS))}"
    found = []
    for entry in entries:
        if NUMBER.fullmatch(entry) and 0 <= int(entry) < layers:
            found.append(str(int(entry)))  # "03" is layer 3, and equals no number's text
        elif entry in KINDS:
            found.append(entry)
        elif NUMBER.fullmatch(entry):
            raise ValueError(f"{argument} names layer {entry}, which this model does not have; {allowed}")
        else:
            near = difflib.get_close_matches(entry, KINDS, n=1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{argument} has {entry[:40]!r}; {meant}{allowed}")
    return found
