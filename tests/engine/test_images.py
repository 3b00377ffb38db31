"""Images in a prompt, whose tokens see each other in both directions: Gemma 3 with its vision tower on the real engine."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from engines import Seen, largest_difference, observe_rounds, raw_pages, recorded_codec, replayed_float_cache, running
from PIL import Image
from tiny_models import IMAGE_TOKEN, IMAGE_TOKENS, START_OF_IMAGE, WORDS
from tq_backend.cli.engine import Engine

DTYPE = "turboquant_4bit_nc"
CHUNK = 64
OPTIONS = {"dtype": "float32", "context": 512, "block_size": 32, "max_num_batched_tokens": CHUNK}

# vLLM's CPU requirements have no torchvision, and its Gemma 3 fails with "ModuleNotFoundError: No module named 'torchvision'": it
# imports the name of an image processor that it never uses where transformers has found no torchvision. An empty module is enough.
PLUGIN = """
import importlib.machinery, sys, types

def install():
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        return
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2", "torchvision.transforms.v2.functional"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        sys.modules[name] = module
        if "." in name:
            setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """vLLM inspects a model's class in a process of its own, where a plugin is loaded too."""
    folder = tmp_path_factory.mktemp("vision")
    info = folder / "no_torchvision-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: no-torchvision\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nno_torchvision = no_torchvision:install\n")
    (folder / "no_torchvision.py").write_text(PLUGIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        before = set(sys.modules)
        __import__("no_torchvision").install()
        yield tiny_models.make_vision(folder / "gemma3")
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("torchvision", "no_torchvision"):
                del sys.modules[name]


def words(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(WORDS), tiny_models.VOCABULARY, (length,), generator=generator).tolist()


def image(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(
        0, 256, (tiny_models.IMAGE_SIZE, tiny_models.IMAGE_SIZE, 3), dtype=np.uint8
    )
    return Image.fromarray(pixels)


def prompt(before: int, after: int, seed: int) -> dict:
    tokens = [*words(before, seed), START_OF_IMAGE, *words(after, seed + 1)]
    return {"prompt_token_ids": tokens, "multi_modal_data": {"image": [image(seed)]}}


# In one chunk; before a long text, so that the window leaves the image behind; across the end of a chunk; in the second round
# beside decodes of the first; and a text alone.
FIRST = [prompt(5, 20, seed=1), prompt(10, 200, seed=3), prompt(CHUNK - 10, 30, seed=5), words(30, seed=7)]
SECOND = [prompt(150, 9, seed=8), prompt(3, 3, seed=10)]


def observe(engine: Engine) -> Seen:
    return observe_rounds(engine, FIRST, SECOND)


def by_definition(model, seen: Seen) -> Seen:
    """Hugging Face's model over the tokens that the engine saw and chose."""
    reference = transformers.AutoModelForImageTextToText.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    processor = transformers.AutoProcessor.from_pretrained(model)
    found = Seen(tokens=seen.tokens)
    for given, tokens, chosen in zip([*FIRST, *SECOND], seen.prompts, seen.tokens, strict=True):
        ids = torch.tensor([tokens + chosen])
        inputs = {"input_ids": ids, "token_type_ids": (ids == IMAGE_TOKEN).long()}
        if isinstance(given, dict):
            assert tokens.count(IMAGE_TOKEN) == IMAGE_TOKENS
            images = given["multi_modal_data"]["image"]
            inputs["pixel_values"] = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            scores = reference(**inputs).logits[0].log_softmax(-1)
        said = scores[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
        if len(found.generated) < len(FIRST):
            found.prompt += said[: len(tokens) - 1]
        found.generated.append(said[len(tokens) - 1 :])
    return found


def test_images_are_attended_in_both_directions(model):
    with raw_pages(), running(DTYPE, model=model, **OPTIONS) as engine:
        ours = observe(engine)
    reference = by_definition(model, ours)
    print("difference", largest_difference(ours, reference))
    assert largest_difference(ours, reference) < 1e-4


def test_compressed_images_equal_the_reference_codec(model):
    record = []
    with recorded_codec(DTYPE, record), running(DTYPE, model=model, **OPTIONS) as engine:
        ours = observe(engine)
    with replayed_float_cache(DTYPE, record), running(DTYPE, model=model, **OPTIONS) as engine:
        reference = observe(engine)
    assert ours.tokens == reference.tokens
    print("difference", largest_difference(ours, reference))
    assert largest_difference(ours, reference) < 0.02
