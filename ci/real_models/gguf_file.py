"""A GGUF file as what a Hugging Face folder is made of: its fields, its tensors in bfloat16, and how the folder is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import Tokenizer

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type


class GgufFile:
    def __init__(self, path: Path, architecture: str) -> None:
        self.reader = GGUFReader(str(path))
        self.architecture = architecture
        found = self.field("general.architecture")
        if found != architecture:
            raise ValueError(f"{path} holds the architecture {found!r}; it must be {architecture!r}")

    def field(self, name: str) -> Any:
        return self.reader.get_field(name).contents()

    def of_model(self, name: str) -> Any:
        return self.field(f"{self.architecture}.{name}")

    def of_tokenizer(self, name: str) -> Any:
        return self.field(f"tokenizer.ggml.{name}")

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and float32 values."""
        for tensor in self.reader.tensors:
            yield tensor.name, torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))


def write_folder(
    folder: Path, weights: dict[str, torch.Tensor], config: dict, tokenizer: Tokenizer, tokenizer_config: dict
) -> None:
    """config.json comes last: a folder that has one is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
    for name, content in (
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | tokenizer_config),
        ("generation_config.json", ids),
        ("config.json", config),
    ):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
