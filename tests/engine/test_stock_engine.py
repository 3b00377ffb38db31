"""An engine without a compressed cache, in a process of its own: beyond registration nothing of this package runs in it but the
question whether it has one, and no shared library of the package is opened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from engines import MODEL

COMMON = """
import collections, json, sys, threading
import tq_backend
from pathlib import Path

PACKAGE = str(Path(tq_backend.__file__).parent)
ran = collections.Counter()

def opened():
    return sorted({line.split()[-1] for line in open("/proc/self/maps") if PACKAGE in line and ".so" in line})

def record(frame, event, _arg):
    if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
        ran[f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"] += 1

def tell(**more):
    sys.setprofile(None), threading.setprofile(None)
    loaded = sorted(name for name in sys.modules if name.startswith("tq_backend."))
    print("answer", json.dumps({"at_registration": at_registration, "opened": opened(), "ran": ran, "loaded": loaded} | more))

from vllm.plugins import load_general_plugins
load_general_plugins()
at_registration = opened()
from vllm.engine.arg_utils import EngineArgs
from tq_backend.vllm_adapter import patches
assert hasattr(EngineArgs.create_engine_config, patches.MARK)  # registration was not passed over
"""
ENGINE = """
from vllm import LLM, SamplingParams
sys.setprofile(record), threading.setprofile(record)
options = {{"max_model_len": 64, "max_num_seqs": 2, "enforce_eager": True, "skip_tokenizer_init": True}}
llm = LLM({model!r}, **options | {more})
params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, detokenize=False)
made = llm.generate([{{"prompt_token_ids": [5, 6, 7]}}], params, use_tqdm=False)[0].outputs[0].token_ids
tell(tokens=len(made))
"""
# What asks, and the functions of vLLM's that are called through it.
ASKING = {
    "names.asks",
    "names.is_ours",
    "patches.wrapped",
    "patches.checked_config",
    "patches.selected_backend",
    "patches.planned_groups",
    "patches.no_alignment",
    "platform.get_attn_backend_cls",
    "platform.<listcomp>",  # the loop of the line above, before Python 3.12
}
AT_REGISTRATION = {
    "tq_backend.names",
    "tq_backend.register",
    "tq_backend.vllm_adapter",
    "tq_backend.vllm_adapter.conflicts",
    "tq_backend.vllm_adapter.patches",
    "tq_backend.vllm_adapter.platform",
    "tq_backend.vllm_adapter.serving",
}


def answer(code: str, **env: str) -> dict:
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"} | env
    done = subprocess.run(
        [sys.executable, "-c", COMMON + code], capture_output=True, text=True, check=False, env=os.environ | env
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("answer ")]
    assert lines, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("answer "))


def test_nothing_of_ours_runs_in_an_engine_that_does_not_ask():
    found = answer(ENGINE.format(model=str(MODEL), more={}))
    assert found["tokens"] == 3
    assert found["at_registration"] == [] and found["opened"] == []
    assert set(found["ran"]) <= ASKING and "patches.checked_config" in found["ran"], found["ran"]
    assert set(found["loaded"]) == AT_REGISTRATION


def test_the_same_recorder_sees_an_engine_that_asks():
    """Or the test above could not fail. Registration opens no library here either: it does not know yet."""
    more = {"kv_cache_dtype": "turboquant_4bit_nc", "attention_backend": "TURBOQUANT"}
    found = answer(ENGINE.format(model=str(MODEL), more=more))
    assert found["tokens"] == 3
    assert found["at_registration"] == []
    assert {Path(path).name for path in found["opened"]} >= {"libtq_backend.so", "libtq_torch.so"}
    assert found["ran"]["impl.forward"] > 0 and found["ran"]["page_plan.grouped"] > 0
