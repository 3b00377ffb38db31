"""`tq-check` names what is wrong, and the other packages that want the same flags."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def tq_check(*args: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tq_backend.cli.check", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | env)


def test_a_competing_plugin_is_named(tmp_path: Path):
    info = tmp_path / "turboquant_vllm-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: turboquant-vllm\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\ntq4 = turboquant_vllm:register\n")
    done = tq_check(PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "turboquant-vllm 1.2 also hooks TurboQuant into vLLM" in done.stdout


def test_the_choice_is_explained():
    done = tq_check(TQ_DEVICE="cpu")
    assert "The cpu kernels are usable, score 110: " in done.stdout, done.stdout
    assert "the cpu kernels run, whose score is highest" in done.stdout


def test_self_test():
    done = tq_check("--self-test", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "turboquant_3bit_nc head_dim 512: store" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("PASSED: ")
    done = tq_check("--self-test", "hip", TQ_HIP_LIBRARY="/nonexistent.so")
    assert done.returncode == 1
    assert "The self-test cannot run: " in done.stdout


def test_missing_kernels_are_the_reason_it_gives(tmp_path: Path):
    done = tq_check(TQ_KERNELS_DIR=str(tmp_path))
    assert done.returncode == 1
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("TurboQuant would not run: ") and "the cpu kernels are not usable" in last
    done = tq_check("--json", TQ_KERNELS_DIR=str(tmp_path))
    assert json.loads(done.stdout[done.stdout.index("{") :])["works"] is False
