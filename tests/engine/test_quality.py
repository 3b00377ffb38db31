"""`tq eval` passes with our kernels, and fails when two centroids trade places."""

from __future__ import annotations

import os
import subprocess
import sys

from engines import MODEL


def tq_eval(*args: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tq_backend.cli.main", "eval", "--model", str(MODEL), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | env)


def test_every_format_is_within_its_bar():
    done = tq_eval()
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("mean KL(bf16 ||") == 4
    assert done.stdout.count("mean KL through decode") == 4


def test_swapped_centroids_are_noticed(build_dir):
    """A kernel library that is wrong in one detail: codes 8 and 9 of every stored key are exchanged."""
    done = tq_eval(
        "--formats", "turboquant_4bit_nc", "--no-decode", TQ_KERNELS_DIR=str(build_dir / "tests" / "swapped_centroids")
    )
    assert done.returncode == 1, done.stdout + done.stderr[-2000:]
    assert "MISSED turboquant_4bit_nc" in done.stdout
