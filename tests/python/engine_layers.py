"""What a real vLLM makes of configurations: its own layers, built by the model's code without memory for weights (on torch's
"meta" device), and its ModelConfig.

engine_layers.py < LIST_OF_CONFIGS > LIST

Of each config: {"layers": [[KV heads, head_dim, window, state bytes], ...] sorted, "length": ...} or {"error": sentence}. In a process of
its own, because it initialises torch.distributed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
)

import torch
from vllm.config import get_layers_from_vllm_config, set_current_vllm_config
from vllm.distributed import destroy_model_parallel, init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import registry
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec


def row(spec) -> list[int]:
    if type(spec) is MambaSpec:
        return [0, 0, 0, spec.state_content_size_bytes]
    if type(spec) not in (FullAttentionSpec, SlidingWindowSpec):
        raise ValueError(f"a layer has a {type(spec).__name__}")
    return [spec.num_kv_heads, spec.head_size, getattr(spec, "sliding_window", None) or 0, 0]


def engines_view(config: dict) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        engine = EngineArgs(
            folder, skip_tokenizer_init=True, enforce_eager=True, runner="generate"
        ).create_engine_config()
    with set_current_vllm_config(engine):
        if not torch.distributed.is_initialized():
            store = Path(tempfile.mkdtemp()) / "store"
            init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        destroy_model_parallel()  # only a model with experts has a group for them
        initialize_model_parallel(1, 1)
        with set_default_torch_dtype(engine.model_config.dtype), torch.device("meta"):
            initialize_model(engine)
    layers = get_layers_from_vllm_config(engine, AttentionLayerBase).values()
    specs = [spec for layer in layers if (spec := layer.get_kv_cache_spec(engine)) is not None]
    return {"layers": sorted(map(row, specs)), "length": engine.model_config.max_model_len}


def main() -> None:
    # vLLM inspects a model's class in a process that imports everything again.
    registry._run_in_subprocess = lambda inspect: inspect()
    out = []
    with contextlib.redirect_stdout(sys.stderr):
        for config in json.load(sys.stdin):
            try:
                out.append(engines_view(config))
            except Exception as error:
                out.append({"error": f"{type(error).__name__}: {error}"})
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    main()
