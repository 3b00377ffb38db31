"""KV tokens of published models: our plans, in-tree TurboQuant's, bf16 and fp8, for the same memory. Arithmetic only.

plan_table.py --json tests/bench/results/plans.json

All four are counted by vLLM's own functions (engine_arithmetic.py). In-tree's plan leaves windows in the native cache, because its
class refuses them; whether the model then runs is another question, and for the Gemma 3n and 4 models it does not.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import engine_arithmetic as engine
from tq_backend import model_layers
from tq_backend.cli.plan import IN_FLIGHT_TOKENS, plan
from tq_backend.cli.results import Figure, write_results
from tq_backend.plan_text import waste_percent

MODELS = Path(__file__).resolve().parent / "model_configs.json"
PRESETS = ("turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc")
FORMAT = "turboquant_4bit_nc"
ALL_PRESETS = ("Gemma 4 E4B",)  # the model whose ratios upstream reported
NONE_SKIPPED = ("Gemma 3 4B", "Gemma 4 31B")  # whose default list of native layers is dear
GIB = 1 << 30


def engines_plan(row: dict, format_name: str, length: int) -> str:
    """KV tokens of the engine's own plan, or why there is none."""
    try:
        found = engine.in_tree_capacity(
            row["config"],
            format_name,
            row["memory_gib"] * GIB,
            tp=row["tp"],
            max_model_len=length,
            in_flight_tokens=IN_FLIGHT_TOKENS,
        )
    except engine.RefusedByEngine as error:
        reason = str(error)
        return "a sequence does not fit" if "max seq len" in reason else reason
    return str(found.kv_tokens)


def figure(name: str, row: dict, format_name: str, skip: list[int] | None = None) -> Figure:
    """Ours as the engine counts it. Raises AssertionError if the planner said something else."""
    memory = row["memory_gib"] * GIB
    found = plan(row["config"], format_name, 16, memory, tp=row["tp"], skip=skip)
    length = found["max_model_len"]
    layers = model_layers.plan_layers(
        model_layers.cache_layers(row["config"], row["tp"]), format_name, 2, found["skipped"]
    )
    counted = engine.capacity_of_plan(layers, found, memory, length, IN_FLIGHT_TOKENS)
    assert counted.kv_tokens == found["kv_tokens"], name
    devices = f", tp {row['tp']}" if row["tp"] > 1 else ""
    plain = {cache: engines_plan(row, cache, length) for cache in ("auto", "fp8", format_name)}
    short = format_name.removeprefix("turboquant_")
    skipped = "" if skip is None else ", none skipped"
    ratio = f"{found['kv_tokens'] / int(plain['auto']):.2f} x bf16; " if plain["auto"].isdigit() else ""
    return Figure(
        f"{name}{devices}, {row['memory_gib']} GiB, {short}{skipped}: groups: {found['num_groups']}, waste {waste_percent(found):.1f} %",
        found["kv_tokens"],
        "KV tokens",
        "the engine's count",
        f"{ratio}vLLM: bf16 {plain['auto']}, fp8 {plain['fp8']}, in-tree {short} {plain[format_name]}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    figures = []
    for name, row in json.loads(MODELS.read_text()).items():
        for format_name in PRESETS if name in ALL_PRESETS else (FORMAT,):
            figures.append(figure(name, row, format_name))
        if name in NONE_SKIPPED:
            figures.append(figure(name, row, FORMAT, []))
    for each in figures:
        print(f"{each.figure}: {each.value} ({each.baseline})")
    write_results(args.json, figures)


if __name__ == "__main__":
    main()
