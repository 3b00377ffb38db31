"""`tq plan` and `tq-check` as a user runs them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "tiny-code-lm"


def tq(*args, module="tq_backend.cli.main"):
    return subprocess.run([sys.executable, "-m", module, *args], capture_output=True, text=True, check=False)


def test_plan_counts_tokens():
    done = tq("plan", "--config", str(MODEL), "--memory", "1GiB", "--block-size", "128", "--json")
    assert done.returncode == 0, done.stderr
    plans = json.loads(done.stdout)
    assert plans["turboquant_4bit_nc"]["page_bytes"] == 128 * 2 * 134
    assert plans["turboquant_4bit_nc"]["kv_tokens"] == 2**30 // (6 * 128 * 2 * 134) * 128
    assert plans["auto"]["page_bytes"] == 128 * 2 * 128 * 2 * 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--config", "/nonexistent", "--memory", "1GiB"], "cannot be read"),
        (
            ["--config", str(MODEL), "--memory", "1GiB", "--format", "turboquant_4bit"],
            "did you mean 'turboquant_4bit_nc'",
        ),
        (["--config", str(MODEL), "--memory", "1GiB", "--block-size", "20"], "block_size is 20"),
        (["--config", str(MODEL), "--memory", "lots"], "is not a memory size"),
    ],
)
def test_plan_says_what_is_wrong(args, words):
    done = tq("plan", *args)
    assert done.returncode == 2
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_plan_refuses_mla(tmp_path):
    config = {"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 1024, "kv_lora_rank": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = tq("plan", "--config", str(tmp_path), "--memory", "1GiB")
    assert done.returncode == 2
    assert "MLA" in done.stdout


def test_check_reports_a_working_installation():
    done = tq("--json", module="tq_backend.cli.check")
    report = json.loads(done.stdout[done.stdout.index("{") :])
    assert done.returncode == 0, done.stdout
    assert report["works"]
    assert report["library"]["libraries"][0]["usable"]
    assert set(report["entry_points"]) == {"tq_backend", "tq_backend_cpu"}
    assert not any(report["probes"].values())


def test_check_usage():
    assert tq("--frobnicate", module="tq_backend.cli.check").returncode == 2
    assert tq("frobnicate").returncode == 2


def test_package_imports_without_torch_and_vllm():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['vllm'] = None\n"
        "import tq_backend; from tq_backend._library import native\n"
        "assert native().abi_version() == (1, 0); print(tq_backend.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_register_never_raises_and_says_why():
    code = (
        "import sys, logging; logging.basicConfig(); sys.modules['vllm'] = None\n"
        "from tq_backend.register import register, cpu_platform\n"
        "register(); register(); assert cpu_platform() is None"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tq-backend declines" in done.stderr
