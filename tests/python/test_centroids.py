"""Our solver with vLLM's discretisation reproduces vLLM's own centroids."""

import json
import subprocess

import pytest

centroids = pytest.importorskip("vllm.model_executor.layers.quantization.turboquant.centroids")


@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize("bits", [3, 4])
def test_equal_to_vllm(build_dir, head_dim, bits):
    program = build_dir / "bin" / "tq_centroids"
    ours = json.loads(subprocess.run([program, str(head_dim), str(bits)], capture_output=True, check=True).stdout)
    theirs = centroids.get_centroids(head_dim, bits).tolist()
    assert len(ours) == len(theirs) == 2**bits
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-6
