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


def config_file(tmp_path, **changes):
    config = json.loads((MODEL / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return str(tmp_path)


def plans(*args):
    done = tq("plan", "--memory", "1GiB", "--json", *args)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_plan_counts_tokens():
    """Of 6 layers, 2 KV heads of 128, the first and last two stay native."""
    found = plans("--config", str(MODEL), "--block-size", "128", "--max-model-len", "4096")
    packed, native = 128 * 2 * 134, 128 * 2 * 128 * 2 * 2
    assert [row["page_bytes"] for row in found["turboquant_4bit_nc"]["layers"]] == [
        native, native, packed, packed, native, native,
    ]  # fmt: skip
    assert found["turboquant_4bit_nc"]["num_blocks"] == 2**30 // (2 * packed + 4 * native)
    assert found["turboquant_4bit_nc"]["skipped"] == [0, 1, 4, 5]
    assert found["auto"]["bytes_per_token"] == 6 * 2 * 128 * 2 * 2
    alike = plans("--config", str(MODEL), "--skip-layers", "none", "--format", "turboquant_4bit_nc")
    assert alike["turboquant_4bit_nc"]["bytes_per_token"] == 6 * 2 * 134


def test_plan_prints_what_each_layer_gets(tmp_path):
    config = config_file(
        tmp_path, layer_types=["sliding_attention"] * 5 + ["full_attention"], sliding_window=512, num_kv_shared_layers=0
    )
    done = tq(
        "plan", "--config", config, "--memory", "1GiB", "--format", "turboquant_4bit_nc", "--max-model-len", "32768"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for words in (
        "block sizes that make all pages nearly equal",
        "bfloat16, window 512, 2 x 128",
        "turboquant_4bit_nc, window 512, 2 x 128",
        "0-1, 4",
        "waste: ",
        "KV tokens",
        "with --skip-layers none: ",
    ):
        assert words in done.stdout, done.stdout
    assert "does not fit" not in done.stdout
    small = tq("plan", "--config", config, "--memory", "1MiB", "--format", "auto", "--max-model-len", "32768")
    assert small.returncode == 0
    assert "a sequence of 32768 tokens does not fit" in small.stdout
    assert "--max-model-len" in small.stdout


def test_plan_splits_heads_over_devices(tmp_path):
    config = config_file(tmp_path, num_attention_heads=8, num_key_value_heads=4)
    two = plans("--config", config, "--tp", "2", "--format", "turboquant_4bit_nc", "--max-model-len", "1024")
    assert two["turboquant_4bit_nc"]["layers"][2]["page_bytes"] == 16 * 2 * 134
    eight = plans("--config", config, "--tp", "8", "--format", "turboquant_4bit_nc", "--max-model-len", "1024")
    assert eight["turboquant_4bit_nc"]["layers"][2]["page_bytes"] == 16 * 1 * 134
    done = tq("plan", "--config", config, "--memory", "1GiB", "--tp", "3")
    assert done.returncode == 2
    assert "num_key_value_heads is 4 and --tp is 3" in done.stdout


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
        (["--config", str(MODEL), "--memory", "1GiB", "--tp", "0"], "'0' is not a whole number"),
        (["--config", str(MODEL), "--memory", "1GiB", "--skip-layers", "first"], "is not a list of layers"),
        (["--config", str(MODEL), "--memory", "1GiB", "--skip-layers", "6"], "layers go from 0 to 5"),
    ],
)
def test_plan_says_what_is_wrong(args, words):
    done = tq("plan", *args)
    assert done.returncode == 2
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_lora_rank": 512}, "MLA"),
        ({"num_hidden_layers": None}, "no num_hidden_layers"),
        ({"layer_types": ["full_attention"]}, "names the types of 1 layers and has 6"),
        ({"layer_types": ["full_attention"] * 4 + ["chunked_attention"] * 2}, "layers [4, 5] have the type"),
        ({"layer_types": ["linear_attention"] * 6}, "layer 0 is linear_attention and the config has no linear_num"),
        ({"torch_dtype": "int8", "dtype": "int8"}, "dtype is int8"),
        (
            {"layer_types": ["full_attention"] * 4 + ["sliding_attention"] * 2, "num_kv_shared_layers": 2},
            "layer 4 reads another one's cache",
        ),
        ({"head_dim": 72}, "so add it to the layers to skip"),
        ({"max_position_embeddings": None}, "give --max-model-len"),
    ],
)
def test_plan_refuses_a_config(tmp_path, changes, words):
    done = tq("plan", "--config", config_file(tmp_path, **changes), "--memory", "1GiB")
    assert done.returncode == 2, done.stdout
    assert words in done.stdout
    assert "Traceback" not in done.stderr


def test_plan_needs_no_engine():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['vllm'] = sys.modules['transformers'] = None\n"
        "from tq_backend.cli.main import main\n"
        f"sys.exit(main(['plan', '--config', {str(MODEL)!r}, '--memory', '1GiB']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "KV tokens" in done.stdout


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
