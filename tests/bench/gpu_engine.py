"""The vLLM engine on a GPU with bf16, fp8, in-tree TurboQuant and our cache: decode steps, and greedy text of the small model.

    python tests/bench/gpu_engine.py [--json OUT] [--caches NAME...] [--formats NAME...] [--contexts N...]
    python tests/bench/gpu_engine.py --generate OUT [--against OUT_OF_ANOTHER_MACHINE]

Steps: a Llama of 8 layers with random weights (32 query heads, 8 KV heads, head_dim 128), decode in FULL CUDA graphs, no
torch.compile. A step is one of the engine, the host's part included, in which all cached prompts decode a token. Each cache runs
in a process of its own, ours and vLLM's TurboQuant once for each format that they have; these compress every layer, and ours run with
the plugin on, all others with it off.

Text: four prompts of tests/engine, prefilled in chunks of 256 tokens, then decoded together. Runs on a CPU too; with --against
the prompts are those of that file, and the differences are printed. Log probabilities over a compressed cache differ by some
tenths between any two machines, because a difference of 1e-6 moves a code at a tie and that code all later ones; with --raw
(floats in the same pages) only rounding remains.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_timing import gpu_name
from tq_backend.cli.engine import cache_dtype, format_option
from tq_backend.cli.heldout import load_tokenizer
from tq_backend.cli.results import Figure, machine, write_results
from tq_backend.names import is_ours

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "tiny-code-lm"
CACHES = ("bf16", "fp8", "in-tree", "ours")
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
STEPS, WARM_UP = 64, 16  # engine steps that are timed, and before them
# At this context a step of ours is so many times as fast as one of these caches, at least.
BAR_CONTEXT, STEP_BARS = 32000, {"bf16": 1.5, "in-tree": 6.0}
MEMORY = 0.6  # of the GPU's, for weights and cache


def compress_every_layer() -> None:
    """vLLM adds the first and last two layers of a dense model to the ones that keep the native cache, and has no flag for it."""
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

    TurboQuantConfig.get_boundary_skip_layers = staticmethod(lambda *_args, **_kwargs: [])


def cache_options(cache: str, kv_format: str) -> dict[str, Any]:
    if cache in ("bf16", "fp8"):
        return {"kv_cache_dtype": "auto" if cache == "bf16" else "fp8"}
    compress_every_layer()
    options = {"turboquant": {"skip_layers": []} | format_option(kv_format)}
    return {
        "kv_cache_dtype": cache_dtype(kv_format),
        "attention_backend": "TURBOQUANT",
        "additional_config": options if cache == "ours" else {},
    }


def check_what_runs(llm: Any, cache: str, graphs: bool) -> None:
    """Raises RuntimeError if another attention serves a layer, or if decodes are not in CUDA graphs."""
    from vllm.compilation.counter import compilation_counter

    config = llm.llm_engine.vllm_config.compilation_config
    served_by = {type(x.impl).__module__ for x in config.static_forward_context.values() if hasattr(x, "impl")}
    print(f"{cache}: attention by {', '.join(sorted(served_by))}; CUDA graphs {config.cudagraph_mode}", flush=True)
    expected = {"ours": "tq_backend.vllm_adapter.impl", "in-tree": "vllm.v1.attention.backends.turboquant_attn"}.get(
        cache
    )
    if expected is not None and served_by != {expected}:
        raise RuntimeError(f"{cache}: attention runs in {served_by}; it should run in {expected}")
    if graphs and compilation_counter.num_cudagraph_captured == 0:
        raise RuntimeError(f"{cache}: no CUDA graph was captured; cudagraph_mode became {config.cudagraph_mode}")


def random_prompts(batch: int, context: int) -> list[dict[str, list[int]]]:
    import torch

    generator = torch.Generator().manual_seed(context)
    return [
        {"prompt_token_ids": torch.randint(10, LLAMA["vocab_size"], (context,), generator=generator).tolist()}
        for _ in range(batch)
    ]


def prefill_rate(llm: Any, prompts: list[dict[str, list[int]]]) -> float:
    """Prompt tokens per second; the prompts are in the prefix cache then."""
    from vllm import SamplingParams

    began = time.perf_counter()
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1, detokenize=False), use_tqdm=False)
    return sum(len(prompt["prompt_token_ids"]) for prompt in prompts) / (time.perf_counter() - began)


def step_times(llm: Any, prompts: list[dict[str, list[int]]]) -> list[float]:
    """Sorted times in ms of engine steps in which every prompt, all cached, decodes one token."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=STEPS + WARM_UP, ignore_eos=True, detokenize=False)
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, params)
    times = []
    while engine.has_unfinished_requests():
        began = time.perf_counter()
        outputs = engine.step()  # returns when the tokens are on the host
        if len(outputs) == len(prompts) and not any(output.finished for output in outputs):
            times.append((time.perf_counter() - began) * 1e3)
    if len(times) < STEPS:
        raise RuntimeError(f"only {len(times)} steps decoded all {len(prompts)} prompts")
    return sorted(times[-STEPS:])


def measure_steps(cache: str, kv_format: str, batch: int, contexts: list[int]) -> tuple[list[Figure], str]:
    """Figures of one cache, and the name of the GPU. Ends with the process: an engine does not give all its memory back."""
    from vllm import LLM

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA))
        llm = LLM(
            model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", seed=0,
            max_model_len=max(contexts) + STEPS + WARM_UP, max_num_seqs=batch, max_num_batched_tokens=8192,
            gpu_memory_utilization=MEMORY, enable_prefix_caching=True,
            compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [batch]},
            **cache_options(cache, kv_format),
        )  # fmt: skip
    check_what_runs(llm, cache, graphs=True)
    cache_config = llm.llm_engine.vllm_config.cache_config
    name = f"{cache} {kv_format}".strip()
    tokens = cache_config.num_gpu_blocks * cache_config.block_size
    figures = [Figure(f"KV tokens in {MEMORY:.0%} of the GPU, {name}", tokens, "tokens")]

    for context in contexts:
        shape = f"batch {batch}, context {context}"
        prompts = random_prompts(batch, context)
        rate, times = prefill_rate(llm, prompts), step_times(llm, prompts)
        spread = f"median of {len(times)} steps, 10th and 90th percentile {times[len(times) // 10]:.3f} and "
        spread += f"{times[len(times) * 9 // 10]:.3f}"
        figures.append(Figure(f"decode step, {name}, {shape}", round(statistics.median(times), 3), "ms", "", spread))
        figures.append(Figure(f"prefill, {name}, {shape}", round(rate), "tokens/s"))
    return figures, gpu_name()


def in_own_process(cache: str, kv_format: str, args: argparse.Namespace) -> tuple[list[Figure], str]:
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "figures.json"
        command = [sys.executable, __file__, "--only", cache, "--json", found, "--formats", kv_format]
        command += ["--batch", args.batch, "--contexts", *args.contexts]
        plugins = "tq_backend" if cache == "ours" else ""
        subprocess.run([str(word) for word in command], check=True, env=os.environ | {"VLLM_PLUGINS": plugins})
        read = json.loads(found.read_text())
    return [Figure(**row) for row in read["figures"]], read["gpu"]


def with_baselines(figures: dict[str, list[Figure]]) -> list[Figure]:
    """All figures; ours say what the other caches reached."""
    for ours in (row for name, rows in figures.items() if name.startswith("ours") for row in rows):
        kind, shape = ours.figure.split(",")[0], ours.figure.split(",")[2:]
        others = [
            f"{cache} {row.value:g}"
            for cache, rows in figures.items()
            for row in rows
            if not cache.startswith("ours") and row.figure.split(",")[0] == kind and row.figure.split(",")[2:] == shape
        ]
        ours.baseline = "; ".join(filter(None, [", ".join(others), ours.baseline]))
        if kind == "decode step" and shape[-1:] == [f" context {BAR_CONTEXT}"]:
            most = [
                row.value / STEP_BARS[name.split()[0]]
                for name, rows in figures.items()
                for row in rows
                if name.split()[0] in STEP_BARS
                and row.figure.split(",")[0] == kind
                and row.figure.split(",")[2:] == shape
            ]
            ours.bar = f"<= {min(most):.2f}" if most else ""
    return [row for rows in figures.values() for row in rows]


def steps(args: argparse.Namespace) -> int:
    figures: dict[str, list[Figure]] = {}
    gpu, failed = "", []
    formats = {"in-tree": [name for name in args.formats if is_ours(name)], "ours": args.formats}
    runs = [(cache, kv_format) for cache in args.caches for kv_format in formats.get(cache, [""])]
    for cache, kv_format in runs:
        name = f"{cache} {kv_format}".strip()
        try:
            figures[name], gpu = in_own_process(cache, kv_format, args)
        except subprocess.CalledProcessError as error:
            failed.append(f"{name} (exit code {error.returncode})")
        if args.json and figures:  # after each: a lent machine may not last
            write_results(args.json, [row for found in figures.values() for row in found], gpu)
    rows = with_baselines(figures)
    for row in rows:
        print(f"{row.figure:70s} {row.value:12g} {row.unit:9s} {row.baseline}")
    if args.json and rows:
        write_results(args.json, rows, gpu)
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return 1 if failed else 0


def generate(args: argparse.Namespace) -> int:
    other = json.loads(args.against.read_text()) if args.against else None
    sys.path.insert(0, str(ROOT / "tests" / "engine"))
    if other:
        prompts = other["prompts"]
    else:
        from test_engine import prompts as engine_prompts

        prompts = engine_prompts()
    if args.raw:
        from engines import raw_pages

        with raw_pages():
            return generate_from(prompts, other, args)
    return generate_from(prompts, other, args)


def generate_from(prompts: list[list[int]], other: dict[str, Any] | None, args: argparse.Namespace) -> int:
    import torch
    from vllm import LLM, SamplingParams

    on_gpu = torch.cuda.is_available()
    graphs = on_gpu and not args.eager
    options = cache_options("ours", args.formats[0])
    options["additional_config"]["turboquant"]["current"] = "compressed"  # as on a CPU
    llm = LLM(
        model=str(MODEL), skip_tokenizer_init=True, dtype=args.dtype, max_model_len=1024, max_num_seqs=8,
        max_num_batched_tokens=256, enable_prefix_caching=True, gpu_memory_utilization=MEMORY, enforce_eager=not graphs,
        **({"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}} if graphs else {}),
        **options,
    )  # fmt: skip
    check_what_runs(llm, "ours", graphs)
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True, detokenize=False, logprobs=0)
    answers = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    tokenizer = load_tokenizer(MODEL)
    outputs = []
    for answer in answers:
        ids, said = list(answer.outputs[0].token_ids), answer.outputs[0].logprobs
        values = [said[i][token].logprob for i, token in enumerate(ids)]
        outputs.append({"tokens": ids, "logprobs": values, "text": tokenizer.decode(ids)})
    where = torch.cuda.get_device_name() if on_gpu else machine()
    about = {
        "machine": where,
        "format": "raw_f32" if args.raw else args.formats[0],
        "dtype": args.dtype,
        "graphs": graphs,
    }
    args.generate.write_text(json.dumps(about | {"prompts": prompts, "outputs": outputs}, indent=1) + "\n")
    for prompt, output in zip(prompts, outputs, strict=True):
        print(f"{len(prompt)} tokens -> {output['text']!r}\n  " + " ".join(f"{x:.4f}" for x in output["logprobs"]))
    return compare(outputs, other) if other else 0


def compare(outputs: list[dict[str, Any]], other: dict[str, Any]) -> int:
    """Log probabilities as far as both chose the same tokens; 1 if a token differs."""
    print(f"against {other['machine']}, {other['format']}, {other['dtype']}:")
    differ = 0
    for number, (mine, theirs) in enumerate(zip(outputs, other["outputs"], strict=True)):
        pairs = list(zip(mine["tokens"], theirs["tokens"], strict=False))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        moved = [abs(a - b) for a, b in zip(mine["logprobs"][:same], theirs["logprobs"][:same], strict=True)]
        print(
            f"  prompt {number}: {same} of {len(pairs)} tokens agree; log probabilities within {max(moved, default=0):.5f}"
        )
        differ |= same < len(pairs)
    return int(differ)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=CACHES)
    parser.add_argument(
        "--formats",
        nargs="+",
        default=["turboquant_4bit_nc"],
        help="of both TurboQuant caches; --generate takes the first",
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--contexts", nargs="+", type=int, default=[8192, 32000])
    parser.add_argument("--only", choices=CACHES, help=argparse.SUPPRESS)
    parser.add_argument("--generate", type=Path, metavar="OUT", help="write greedy text of the small model there")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with what --generate wrote elsewhere")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtype", default="float32", help="of the small model")
    parser.add_argument("--raw", action="store_true", help="the small model over pages of floats (test format raw_f32)")
    parser.add_argument("--eager", action="store_true", help="the small model without CUDA graphs")
    args = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if args.generate:
        return generate(args)
    if not args.only:
        return steps(args)
    figures, gpu = measure_steps(args.only, args.formats[0], args.batch, args.contexts)
    args.json.write_text(json.dumps({"figures": [vars(figure) for figure in figures], "gpu": gpu}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
