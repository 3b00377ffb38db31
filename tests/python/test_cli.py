"""`tq plan` and `tq-check` as a user runs them."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tq_backend import __version__
from tq_backend.cli import read_config
from tq_backend.cli.main import main
from tq_backend.cli.plan import parse_memory

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "tiny-code-lm"


def tq(*args):
    """In this process, where vLLM is imported once."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(args))
        except SystemExit as stop:  # argparse
            code = stop.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def tq_process(*args, module="tq_backend.cli.main", **options):
    return subprocess.run([sys.executable, "-m", module, *args], capture_output=True, text=True, check=False, **options)


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
        (
            {"model_type": "strange", "num_hidden_layers": None},
            "does not take this configuration|cannot be read without the class",
        ),
        ({"layer_types": ["full_attention"]}, "one entry for each of the 6 layers"),
        ({"layer_types": ["full_attention"] * 4 + ["chunked_attention"] * 2}, r"layers \[4, 5\] have the type"),
        ({"layer_types": ["linear_attention"] * 6}, "layer 0 is linear_attention and the config has no linear_num"),
        ({"torch_dtype": "int8", "dtype": "int8"}, "dtype is 'int8'"),
        (
            {
                "layer_types": ["full_attention"] * 4 + ["sliding_attention"] * 2,
                "num_kv_shared_layers": 2,
                "sliding_window": 9,
            },
            "layer 4 reads another one's cache",
        ),
        ({"head_dim": 72}, "so add it to the layers to skip"),
        ({"model_type": "bloom", "n_layer": 6, "n_head": 8, "max_position_embeddings": None}, "give --max-model-len"),
    ],
)
def test_plan_refuses_a_config(tmp_path, changes, words):
    done = tq("plan", "--config", config_file(tmp_path, **changes), "--memory", "1GiB")
    assert done.returncode == 2, done.stdout
    assert re.search(words, done.stdout), done.stdout


def test_plan_needs_no_engine():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['vllm'] = sys.modules['transformers'] = None\n"
        "from tq_backend.cli.main import main\n"
        f"sys.exit(main(['plan', '--config', {str(MODEL)!r}, '--memory', '1GiB']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "KV tokens" in done.stdout


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 << 30), ("24gib", 24 << 30), ("24G", 24 << 30), ("24g", 24 << 30), ("24 GB", 24 * 10**9), ("1.5T", 3 << 39),
        ("2tb", 2 * 10**12), ("1M", 1 << 20), ("1048576", 1 << 20), ("1048576B", 1 << 20), (".5GiB", 1 << 29), ("4096k", 4 << 20),
    ],
)  # fmt: skip
def test_memory_is_read_in_any_case(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("24", "'24' is 24 bytes; it must be from 1MiB to 1024TiB; is its unit missing?"), ("1023KiB", "it must be from 1MiB"),
        ("0GiB", "it must be from 1MiB"), ("9999TiB", "it must be from 1MiB"), ("1e9", "is not a memory size"), ("-1GiB", "is not a memory"),
        ("24Gi", "is not a memory size"), ("inf", "is not a memory size"), ("9" * 1000, "is not a memory size"),
        ("\u0665GiB", "is not a memory size"), ("", "is not a memory size"),
    ],
)  # fmt: skip
def test_memory_that_is_none(text, words):
    done = tq("plan", "--config", str(MODEL), f"--memory={text}")
    assert done.returncode == 2
    assert words in done.stderr


@pytest.mark.parametrize(
    "flag", ["--tp", "--max-model-len", "--block-size", "--in-flight-tokens", "--blocks-per-state"]
)
@pytest.mark.parametrize("value", ["0", "-1", "1.5", str(2**31), str(2**32 + 16), str(10**30), "x"])
def test_numbers_beyond_32_bits_are_refused(flag, value):
    done = tq("plan", "--config", str(MODEL), "--memory", "1GiB", f"{flag}={value}")
    assert done.returncode == 2
    assert f"argument {flag}: " in done.stderr and "is not a whole number from 1 to 2147483647" in done.stderr


HOSTILE_TEXTS = {
    "empty": b"",
    "not JSON": b"{,}",
    "not UTF-8": b'{"model_type": "ll\xffma"}',
    "UTF-16": '{"model_type": "llama"}'.encode("utf-16"),
    "a list": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "NaN": b'{"model_type": "llama", "initializer_range": NaN}',
    "Infinity": b'{"model_type": "llama", "initializer_range": Infinity}',
    "a huge float": b'{"model_type": "llama", "hidden_size": 1e400}',
    "a number of 10,000 digits": b'{"model_type": "llama", "hidden_size": ' + b"9" * 10_000 + b"}",
    "deep nesting": b'{"model_type": "llama", "a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "nested text configs": b'{"text_config": ' * 500 + b"{}" + b"}" * 500,
    "no model_type": b'{"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}',
    "a text config that is none": b'{"model_type": "llava", "text_config": "llama"}',
}
HOSTILE_VALUES = [
    {key: value}
    for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "max_position_embeddings",
                "sliding_window")
    for value in ("32", [32], {"a": 1}, True, -1, 1.5, 2**31, 2**32 + 16, -(2**32), 10**30)
] + [
    {"num_hidden_layers": 0}, {"num_attention_heads": 0}, {"num_key_value_heads": 0}, {"hidden_size": 0}, {"hidden_size": 7, "head_dim": None}, {"vocab_size": "4096"}, {"rms_norm_eps": "1e-5"}, {"rms_norm_eps": -2.0},
    {"max_position_embeddings": 0}, {"num_hidden_layers": 10**6}, {"layer_types": "full_attention"}, {"layer_types": [1] * 6},
    {"layer_types": [None] * 6}, {"layer_types": {}}, {"layer_types": ["sliding_attention"] * 6}, {"architectures": "Llama"},
    {"architectures": [1]}, {"model_type": 3}, {"model_type": None}, {"model_type": ["llama"]}, {"model_type": ""}, {"dtype": "int8"},
    {"dtype": ["bfloat16"]}, {"dtype": {}}, {"num_kv_shared_layers": 6}, {"num_kv_shared_layers": -1}, {"num_kv_shared_layers": "2"},
    {"block_configs": [1] * 6}, {"block_configs": [{}] * 6}, {"block_configs": [{"attention": {"n_heads_in_group": 0}}] * 6},
    {"attn_type_list": [1]}, {"attn_type_list": 5}, {"attn_layer_period": 0}, {"hybrid_override_pattern": 5},
    {"hybrid_override_pattern": "MMQ"}, {"per_layer_config": [1]}, {"per_layer_config": {"0": 1}}, {"rope_scaling": [1]},
    {"rope_scaling": {"type": "linear", "factor": "4"}}, {"rope_scaling": {"type": "linear", "factor": 1e300}},
    {"linear_num_value_heads": "4"}, {"text_config": 1}, {"text_config": []}, {"v_head_dim": 64}, {"is_encoder_decoder": True},
]  # fmt: skip


def refused_at_once(file):
    began = time.process_time()  # the clock of a busy machine says nothing
    done = tq("plan", "--config", str(file), "--memory", "1GiB")
    seconds = time.process_time() - began
    assert done.returncode == 2, done.stdout
    assert done.stdout.startswith("tq plan: ") and done.stdout.count("\n") == 1, done.stdout
    assert len(done.stdout) < 1000
    assert seconds < 1, done.stdout


@pytest.mark.parametrize("what", HOSTILE_TEXTS)
def test_what_is_no_configuration(what, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(HOSTILE_TEXTS[what])
    refused_at_once(file)


@pytest.mark.parametrize("changes", HOSTILE_VALUES, ids=str)
def test_values_that_are_none(changes, tmp_path):
    config = json.loads((MODEL / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused_at_once(tmp_path)


def test_a_refusal_imports_no_library(tmp_path):
    """Which is why it takes less than a second in a new process too."""
    config_file(tmp_path, layer_types=["full_attention"])
    code = (
        "import sys; from tq_backend.cli.main import main\n"
        f"code = main(['plan', '--config', {str(tmp_path)!r}, '--memory', '1GiB'])\n"
        "assert code == 2 and not {'torch', 'vllm', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    big = tmp_path / "big.json"
    big.write_bytes(b'{"model_type": "llama"}' + b" " * read_config.MOST_BYTES)
    for name in (tmp_path, tmp_path / "fifo", big, "/dev/zero", "a" * 5000, "a\0b", "no/such", "../no"):
        refused_at_once(name)


def test_a_hugging_face_name_finds_the_local_cache(tmp_path, monkeypatch):
    folder = tmp_path / "hub" / "models--some--model"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc\n")
    (folder / "snapshots" / "abc" / "config.json").write_text((MODEL / "config.json").read_text())
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert plans("--config", "some/model") == plans("--config", str(MODEL))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    done = tq("plan", "--config", "some/model", "--memory", "1GiB")
    assert done.returncode == 2
    assert "no such model in the local Hugging Face cache" in done.stdout


def test_float32_weights_are_served_in_bfloat16(tmp_path):
    config = config_file(tmp_path, dtype="float32", torch_dtype="float32")
    assert plans("--config", config, "--format", "auto")["auto"]["bytes_per_token"] == 6 * 2 * 128 * 2 * 2
    found = plans("--config", config, "--format", "auto", "--dtype", "float32")
    assert found["auto"]["bytes_per_token"] == 6 * 2 * 128 * 2 * 4


def test_versions():
    assert tq("--version").stdout == f"tq {__version__}\n"
    assert tq_process("--version", module="tq_backend.cli.check").stdout == f"tq-check {__version__}\n"


def test_check_reports_a_working_installation():
    done = tq_process("--json", module="tq_backend.cli.check")
    report = json.loads(done.stdout[done.stdout.index("{") :])
    assert done.returncode == 0, done.stdout
    assert report["works"]
    assert report["library"]["libraries"][0]["usable"]
    assert set(report["entry_points"]) == {"tq_backend", "tq_backend_cpu"}
    assert not any(report["probes"].values())


def test_check_usage():
    assert tq_process("--frobnicate", module="tq_backend.cli.check").returncode == 2
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
