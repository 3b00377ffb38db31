"""Largest log probability difference between the engine over compressed pages and over a float cache of the same codec.

    python tests/bench/engine_exactness.py [--json OUT]

The same runs as tests/engine/test_engine.py, whose words explain them, with their numbers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))

from engines import raw_pages, recorded_codec, replayed_float_cache, running
from test_engine import OPTIONS, largest_difference, observe
from tq_backend.cli.quality import REFERENCE_KL
from tq_backend.cli.results import Figure, write_results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with running(None, **OPTIONS) as engine:
        stock = observe(engine)
    with raw_pages(), running("turboquant_4bit_nc", **OPTIONS) as engine:
        ours = observe(engine)
    figures = [
        Figure(
            "largest log probability difference, raw_f32 pages",
            largest_difference(ours, stock),
            "nat",
            "<= 1e-4",
            "stock vLLM, float32",
        )
    ]
    for name in REFERENCE_KL:
        record = []
        with recorded_codec(name, record), running(name, **OPTIONS) as engine:
            ours = observe(engine)
        with replayed_float_cache(name, record), running(name, **OPTIONS) as engine:
            reference = observe(engine)
        figures.append(
            Figure(f"largest log probability difference, {name}", largest_difference(ours, reference), "nat", "<= 0.02",
                   "float cache of the reference codec")
        )  # fmt: skip
    for figure in figures:
        print(f"{figure.figure:65s} {figure.value:.2e} {figure.bar}")
    if args.json:
        write_results(args.json, figures)
    return 0 if figures[0].value <= 1e-4 and all(f.value <= 0.02 for f in figures[1:]) else 1


if __name__ == "__main__":
    sys.exit(main())
