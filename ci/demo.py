"""The main job: a real vLLM serves a small model from a bf16 cache and from each TurboQuant format, side by side.

Per cache: bytes per token, KV tokens in the same memory, perplexity and KL to bf16 over one window of held-out code, secret keys
retrieved over nearly 4k tokens of context, and generated tokens per second. Writes build/demo.json and build/demo.png.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "tiny-code-lm"
OUT = ROOT / "build"
WINDOW = 2048
CONTEXT = 4096
KEYS = 8
ANSWER_TOKENS = 12
SPEED_TOKENS = 128

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "1")
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

from tq_backend._library import native  # noqa: E402
from tq_backend.cli.engine import KV_CACHE_BYTES, Engine, counters  # noqa: E402
from tq_backend.cli.heldout import heldout_tokens, load_tokenizer, retrieval_prompt  # noqa: E402
from tq_backend.cli.plan import plan  # noqa: E402
from tq_backend.cli.read_config import read_file  # noqa: E402
from tq_backend.cli.scores import compare  # noqa: E402
from tqdm import tqdm  # noqa: E402

FORMATS = [None, *(row["name"] for row in native().formats() if not row["test_only"])]
SHOWN = "tq_8"  # whose text is printed


def retrieved(engine: Engine) -> int:
    from vllm import SamplingParams

    prompts = [retrieval_prompt(MODEL, key, CONTEXT - ANSWER_TOKENS - 16) for key in range(KEYS)]
    params = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, detokenize=False)
    outputs = engine.llm.generate([{"prompt_token_ids": tokens} for tokens, _ in prompts], params, use_tqdm=False)
    tokenizer = load_tokenizer(MODEL)
    texts = [tokenizer.decode(list(output.outputs[0].token_ids)) for output in outputs]
    return sum(secret in text for text, (_, secret) in zip(texts, prompts, strict=True))


def speed(engine: Engine) -> tuple[float, str]:
    """Generated tokens per second of 8 different sequences at a context of 2k, and what the first one says.

    The prompts run twice: the second time their prefill comes from the prefix cache, so that the time is the decode's.
    """
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=SPEED_TOKENS, ignore_eos=True, detokenize=False)
    text = heldout_tokens(MODEL, 8 * WINDOW)
    prompts = [{"prompt_token_ids": text[i * WINDOW : (i + 1) * WINDOW]} for i in range(8)]
    once = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    engine.llm.generate(prompts, once, use_tqdm=False)
    began = time.perf_counter()
    outputs = engine.llm.generate(prompts, params, use_tqdm=False)
    elapsed = time.perf_counter() - began
    said = load_tokenizer(MODEL).decode(list(outputs[0].outputs[0].token_ids)[:40])
    return 8 * SPEED_TOKENS / elapsed, said


def main() -> None:
    config = read_file(MODEL)
    tokens = heldout_tokens(MODEL, WINDOW)
    base = None
    rows = []
    progress = tqdm(FORMATS, unit="cache")
    for name in progress:
        progress.set_description(name or "bf16")
        engine = Engine(MODEL, name, CONTEXT, enable_prefix_caching=True)
        before = counters()
        hidden = engine.prefill(tokens)
        read = counters()["compressed_kv_reads"] - before["compressed_kv_reads"]
        base = hidden if base is None else base
        score = compare(engine, base, hidden, tokens[1:])
        per_second, text = speed(engine)
        sizes = plan(config, name or "auto", 128, KV_CACHE_BYTES, max_model_len=CONTEXT, skip=[])
        rows.append(
            {
                "cache": name or "bf16",
                "bytes_per_token": sizes["bytes_per_token"],
                "kv_tokens": sizes["kv_tokens"],
                "perplexity": math.exp(score.nll),
                "kl": score.kl,
                "keys_retrieved": retrieved(engine),
                "tokens_per_second": per_second,
                "compressed_kv_reads": read,
                "text": text,
            }
        )
        expected = 0 if name is None else engine.num_layers * WINDOW * (WINDOW + 1) // 2
        if read != expected:
            raise SystemExit(
                f"{name or 'bf16'}: our kernels read {read} tokens of the cache, not {expected}: another kernel ran"
            )
        engine.close()
    print(
        f"\n{'cache':20s} {'B/token':>8s} {'KV tokens/GiB':>14s} {'perplexity':>11s} {'KL to bf16':>11s} {'keys of 8':>10s} {'tokens/s':>9s}"
    )
    for row in rows:
        print(
            f"{row['cache']:20s} {row['bytes_per_token']:8d} {row['kv_tokens']:14d} {row['perplexity']:11.3f} {row['kl']:11.4f} "
            f"{row['keys_retrieved']:10d} {row['tokens_per_second']:9.0f}"
        )
    shown = next(row for row in rows if row["cache"] == SHOWN)
    print(f"\n{SHOWN} continues the held-out code with: {shown['text']!r}")
    OUT.mkdir(exist_ok=True)
    (OUT / "demo.json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows)
    print(f"written: {OUT.relative_to(ROOT)}/demo.json and demo.png")


def plot(rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4))
    names = [row["cache"].replace("turboquant_", "") for row in rows]
    for axis, key, title in zip(
        axes,
        ("kv_tokens", "kl", "tokens_per_second"),
        ("KV tokens in 1 GiB", "mean KL to bf16 (nat)", "generated tokens/s, batch 8"),
        strict=True,
    ):
        axis.bar(names, [row[key] for row in rows])
        axis.set_title(title)
        axis.tick_params(axis="x", rotation=30)
    figure.tight_layout()
    figure.savefig(OUT / "demo.png", dpi=110)


if __name__ == "__main__":
    main()
