"""Writes the figures of README.md and of docs/ from tests/bench/results/*.json, so that none is typed by hand.

readme_figures.py [--check]      with --check: changes nothing, exit code 1 if a page is out of date
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- figures -->\n).*?(<!-- end of figures -->)", re.S)
README = "README.md"
PLAN_BLOCK = re.compile(r"(<!-- plans -->\n).*?(<!-- end of plans -->)", re.S)
FORMATS_BLOCK = re.compile(r"(<!-- formats -->\n).*?(<!-- end of formats -->)", re.S)
SHOWN = ("bf16", "fp8", "tq_8", "tq_k5v4", "tq_4", "turboquant_k8v4", "turboquant_4bit_nc")
STEP, TOKENS = "decode step, {}, batch 32, context 32000", "KV tokens in 60% of the GPU, {}"
PLAN = re.compile(r"(?P<model>[^,]+),.*: groups: (?P<groups>\d+), waste (?P<waste>[\d.]+) %")
PAGE_OF = {
    "plans.json": "docs/models.md",
    "gpu_attention.json": "docs/gpu.md",
    "gpu_formats.json": "docs/gpu.md",
    "gpu_sanitizers.json": "docs/gpu.md",
    "real_models.json": "docs/formats.md",
}  # results that are quoted elsewhere than in the README
FIELDS = ("figure", "value", "unit", "bar", "baseline", "machine", "date", "command")
EVAL_FIELDS = ("model", "text", "cache", "bytes_per_token", "windows", "window", "kl", "kl_se", "perplexity", "top1", "against",
               "machine", "date", "command")  # and more, of `tq eval`  # fmt: skip


def cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")


def table(file: Path) -> str:
    """One results file as a table under the command that wrote it. Raises ValueError for an entry of another form."""
    rows = json.loads(file.read_text())
    if rows and all(set(EVAL_FIELDS) <= set(row) for row in rows):
        return eval_table(rows)
    for row in rows:
        if set(row) != set(FIELDS):
            raise ValueError(f"{file.name}: an entry has the keys {sorted(row)}; it must have {sorted(FIELDS)}")
    lines = []
    for command, machine, date in dict.fromkeys((row["command"], row["machine"], row["date"]) for row in rows):
        lines += [
            "",
            f"`{command}` on {machine}, {date}:",
            "",
            "| figure | value | to reach | against |",
            "|---|---|---|---|",
        ]
        for row in rows:
            if (row["command"], row["machine"], row["date"]) == (command, machine, date):
                unit = "" if row["unit"] == "1" else f" {row['unit']}"
                lines.append(
                    f"| {cell(row['figure'])} | {cell(row['value'])}{unit} | {cell(row['bar'])} | {cell(row['baseline'])} |"
                )
    return "\n".join(lines[1:])


def plus_minus(value: float, error: float | None, style: str) -> str:
    return f"{value:{style}}" + ("" if error is None else f" +-{error:{style}}")


def eval_table(rows: list[dict]) -> str:
    """What `tq eval --json` wrote: a line per model, text and cache."""
    lines = []
    for command, machine, date in dict.fromkeys((row["command"], row["machine"], row["date"]) for row in rows):
        own = [row for row in rows if (row["command"], row["machine"], row["date"]) == (command, machine, date)]
        size = f"{own[0]['windows']} windows of {own[0]['window']} tokens"
        lines += [
            "",
            f"`{command}` on {machine}, {date}, {size}:",
            "",
            "| model | text | cache | bytes per token | mean KL to bf16, nat | perplexity | same top 1 | KL against |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in own:
            against = row["against"]
            ratio = f"{against['ratio']:.3g} times {against['format']}'s" if against else ""
            note = f" ({row['note']})" if row.get("note") else ""
            lines.append(
                f"| {cell(row['model'])} | {cell(row['text'])} | {cell(row['cache'])}{note} | {row['bytes_per_token']} | "
                f"{plus_minus(row['kl'], row['kl_se'], '.4f')} | {row['perplexity']:.4g} | {row['top1']:.2%} | {ratio} |"
            )
    return "\n".join(lines[1:])


def plan_sentence(file: Path) -> str:
    """What vLLM's choice of native layers costs, for the models of plans.json that were also planned without any."""
    rows = [(row, PLAN.fullmatch(row["figure"])) for row in json.loads(file.read_text())]
    parts = []
    for none, found in rows:
        if ", none skipped:" not in none["figure"]:
            continue
        twin = none["figure"].partition(", none skipped:")[0] + ": groups:"
        default, before = next((row, match) for row, match in rows if row["figure"].startswith(twin))
        parts.append(
            f"{found['model']} {before['waste']} % waste in {before['groups']} groups ({default['value']} KV tokens), and "
            f"{found['waste']} % in {found['groups']} with none skipped ({none['value']})"
        )
    return "vLLM's grouping makes the default list of native layers dear for some models:\n" + ";\n".join(parts) + ".\n"


def bytes_of(cache: str) -> int:
    """Of one token and KV head of 128."""
    from tq_backend._library import native

    native_bytes = {"bf16": 512, "fp8": 256}
    return native_bytes.get(cache) or native().kv_cache_spec(cache, 1, 128, 128)["slot_bytes"]


def formats_table(answers: Path, engine: Path) -> str:
    """What each cache costs and keeps: from `tq eval` on real models, and from the engine on a GPU."""
    rows = json.loads(answers.read_text())
    steps = {row["figure"]: row["value"] for row in json.loads(engine.read_text())}
    kinds = list(dict.fromkeys((row["model"], row["text"]) for row in rows))
    lines = [
        f"| cache | bytes | {' | '.join(f'{model}, {text}' for model, text in kinds)} | step, ms | KV tokens |",
        "|---" * (len(kinds) + 4) + "|",
    ]
    for cache in SHOWN:
        found = [
            next((r for r in rows if (r["model"], r["text"], r["cache"]) == (*kind, cache)), None) for kind in kinds
        ]
        kl = [f"{row['kl']:.4f}" if row else "" for row in found]
        name = cache if cache in ("bf16", "fp8") else f"ours {cache}"
        step, tokens = steps.get(STEP.format(name)), steps.get(TOKENS.format(name))
        last = f"{step:.2f} | {tokens / 1e6:.1f} M" if step and tokens else " | "
        lines.append(f"| {cache} | {bytes_of(cache)} | {' | '.join(kl)} | {last} |")
    return "\n".join(lines) + "\n"


def rewritten(page: str, results: Path, name: str = README) -> str:
    """A page's text with its figures replaced. Raises ValueError if the markers are not there once."""
    files = [file for file in sorted(results.glob("*.json")) if PAGE_OF.get(file.name, README) == name]
    text = "\n\n".join(map(table, files)) or "Not measured yet."
    new, count = BLOCK.subn(lambda match: f"{match[1]}{text}\n{match[2]}", page)
    if count != 1:
        raise ValueError(f"{name} has {count} blocks of figures between the markers; it must have one")
    if PLAN_BLOCK.search(new):
        sentence = plan_sentence(results / "plans.json")
        new = PLAN_BLOCK.sub(lambda match: f"{match[1]}{sentence}{match[2]}", new)
    if FORMATS_BLOCK.search(new):
        rows = formats_table(results / "real_models.json", results / "gpu_engine.json")
        new = FORMATS_BLOCK.sub(lambda match: f"{match[1]}{rows}{match[2]}", new)
    return new


def main() -> int:
    stale = []
    for name in (README, *sorted(set(PAGE_OF.values()))):
        old = (ROOT / name).read_text()
        new = rewritten(old, ROOT / "tests" / "bench" / "results", name)
        if new != old:
            stale.append(name)
        if sys.argv[1:] != ["--check"]:
            (ROOT / name).write_text(new)
    if sys.argv[1:] == ["--check"] and stale:
        print(f"{', '.join(stale)}: out of date with tests/bench/results; run ci/readme_figures.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
