"""Users have no compiler: an engine with our backend runs where there is none, and looks for none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

COMPILERS = ("ninja", "cmake", "make", "nvcc", "hipcc", "cc", "c++", "gcc", "g++", "clang", "clang++", "ptxas")

RUN = """
from engines import MODEL, running
from tq_backend.cli.engine import counters
from vllm import SamplingParams

with running("turboquant_4bit_nc", context=64) as engine:
    params = SamplingParams(temperature=0, max_tokens=4, detokenize=False)
    engine.llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)
    print("attend_calls", counters()["attend_calls"])
"""


def test_an_engine_runs_without_a_compiler(tmp_path):
    """PATH holds what vLLM itself asks for, lscpu, and compilers that only note that they were called."""
    called = tmp_path / "called"
    (tmp_path / "lscpu").symlink_to(shutil.which("lscpu"))
    for name in COMPILERS:
        stub = tmp_path / name
        stub.write_text(f"#!/bin/sh\necho {name} >> {called}\nexit 1\n")
        stub.chmod(0o755)
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX")}
    env |= {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path), "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    # 6 layers, one prefill and 3 decodes.
    assert "attend_calls 24" in done.stdout, done.stdout
    assert not called.exists(), called.read_text()
