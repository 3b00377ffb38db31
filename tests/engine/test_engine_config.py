"""What an engine with a turboquant_* cache may be, what its configuration becomes, and who else hooks into it.

The wrapped create_engine_config runs on the real EngineArgs; what only a GPU or a cluster would meet gets configuration objects.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from engines import MODEL
from tq_backend.names import BACKEND_PATH
from tq_backend.register import register
from tq_backend.vllm_adapter import conflicts, engine_config, formats, patches, serving, skip_layers, tolerance
from tq_backend.vllm_adapter.backend import TurboQuantBackend
from tq_backend.vllm_adapter.impl import TurboQuantImpl
from tq_backend.vllm_adapter.kv_sharing import aligned_skip_layers
from tq_backend.vllm_adapter.metadata import TurboQuantMetadataBuilder, check_window
from tq_backend.vllm_adapter.options import check_in_force
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.interface import DeviceCapability
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

DTYPE = "turboquant_4bit_nc"


@pytest.fixture(autouse=True)
def registered():
    load_general_plugins()  # once per process, so that no test's first EngineArgs does it
    register()


def made(**flags):
    flags = {"model": str(MODEL), "kv_cache_dtype": DTYPE, "attention_backend": "TURBOQUANT"} | flags
    return EngineArgs(**flags, skip_tokenizer_init=True).create_engine_config()


def test_an_explicit_flag_is_a_choice_per_layer_and_forces_no_flash_attention():
    config = made()
    assert config.attention_config.backend is None
    assert config.attention_config.flash_attn_version is None
    assert config.cache_config.kv_cache_dtype_skip_layers == ["0", "1", "4", "5"]
    assert made(attention_config={"flash_attn_version": 2}).attention_config.flash_attn_version == 2


def test_a_chosen_format_needs_no_native_layers():
    """vLLM's default list protects its presets; the user's own list stays, and so does the list for a preset that is chosen."""
    with_format = {"turboquant": {"format": "tq_8"}}
    assert made(additional_config=with_format).cache_config.kv_cache_dtype_skip_layers == []
    assert formats.page_format(DTYPE) == "tq_8"
    own = made(additional_config=with_format, kv_cache_dtype_skip_layers=["3"])
    assert own.cache_config.kv_cache_dtype_skip_layers == ["3"]
    preset = made(additional_config={"turboquant": {"format": "turboquant_k8v4"}})
    assert preset.cache_config.kv_cache_dtype_skip_layers == ["0", "1", "4", "5"]
    assert formats.page_format(DTYPE) == "turboquant_k8v4"
    made()
    assert formats.page_format(DTYPE) == DTYPE


@pytest.mark.parametrize(
    ("name", "hint"), [("tq_9", "did you mean 'tq_8'"), ("raw_f32", "must be one of"), (8, "must be one of")]
)
def test_a_format_that_does_not_exist_is_refused(name, hint):
    with pytest.raises(
        ValueError, match=rf"\['format'\] is {name!r}; it must be one of turboquant_k8v4, .*"
    ) as refused:
        made(additional_config={"turboquant": {"format": name}})
    assert hint in str(refused.value)


def test_skip_layers_replace_vllms_choice():
    config = made(additional_config={"turboquant": {"skip_layers": [3]}})
    assert config.cache_config.kv_cache_dtype_skip_layers == ["3"]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (
            [999],
            "names layer 999, which this model does not have; it takes layer numbers from 0 to 5 and 'sliding_window'",
        ),
        ([-1], "names layer -1, which"),
        (["6"], "names layer 6, which"),
        ([2**32], "names layer 4294967296, which"),  # 0 in 32 bits
        (["sliding_windows"], "has 'sliding_windows'; did you mean 'sliding_window'? it takes"),
        (["full"], "has 'full'; it takes"),
        (["²"], "has '²'; it takes"),
        (["9" * 5000], "has '9999"),
        ([""], "has ''; it takes"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_layers_that_do_not_exist_are_no_layers_to_skip(entries, words):
    with pytest.raises(ValueError, match=re.escape(f"additional_config['turboquant']['skip_layers'] {words}")):
        made(additional_config={"turboquant": {"skip_layers": entries}})
    with pytest.raises(ValueError, match=re.escape(f"--kv-cache-dtype-skip-layers {words}")):
        made(kv_cache_dtype_skip_layers=[str(entry) for entry in entries])


def test_numbers_of_layers_are_compared_as_numbers():
    config = made(additional_config={"turboquant": {"skip_layers": ["03", 3, "sliding_window"]}})
    assert config.cache_config.kv_cache_dtype_skip_layers == ["3", "3", "sliding_window"]
    draft = SimpleNamespace(hf_text_config=SimpleNamespace(num_hidden_layers=1))
    text = SimpleNamespace(num_hidden_layers=6)
    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=text), speculative_config=SimpleNamespace(draft_model_config=draft)
    )
    assert skip_layers.num_layers(config) == 7


WINDOWS = [4294967312, 2**32, -(2**32), 2**31, 0, True, 1.5, "16"]


@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_that_wraps_around_is_refused(window):
    """In 32 bits 4294967312 is 16, 2^32 and -2^32 are none."""
    sentence = re.escape(f"['sliding_window'] is {window!r}; it must be a number of tokens from 1 to 2147483647")
    with pytest.raises(ValueError, match=sentence):
        made(additional_config={"turboquant": {"sliding_window": window}})


def test_a_window_of_the_models_that_wraps_around_is_refused():
    with pytest.raises(
        ValueError, match="or of --hf-overrides, is 4294967312; it must be a number of tokens from 1 to"
    ):
        made(hf_overrides={"sliding_window": 2**32 + 16})
    assert made(hf_overrides={"sliding_window": 2**31 - 1}).cache_config.sliding_window == 2**31 - 1
    assert made(hf_overrides={"sliding_window": None}).cache_config.sliding_window is None


@pytest.mark.parametrize(
    ("given", "line"),
    [(None, "vLLM's own choice is in force"), (3, "flash_attn_version 3 is in force"), (2, "")],
)
def test_what_vllm_says_of_flash_attention_is_put_right(given, line, lines_said):
    config = made(attention_config={} if given is None else {"flash_attn_version": given})
    assert config.attention_config.flash_attn_version == given
    about = [text for text in lines_said if "FlashAttention >= 3" in text]
    assert len(about) == (2 if line else 0), about
    if line:  # vLLM's, and then ours with its words in it
        assert re.search(
            r"TurboQuant is not yet compatible with FlashAttention >= 3. Overriding flash_attn_version to 2", about[0]
        )
        assert about[1].startswith("tq-backend: vLLM's line") and line in about[1]


def test_a_hybrid_without_a_list_of_layer_types_is_served(tmp_path):
    """Falcon-H1: vLLM's check finds no layer with attention in its configuration."""
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

    own = TurboQuantConfig.get_boundary_skip_layers
    model = tiny_models.make_config("falcon_h1", "FalconH1ForCausalLM", tmp_path)
    config = made(model=str(model))
    assert config.cache_config.kv_cache_dtype_skip_layers == []
    assert TurboQuantConfig.get_boundary_skip_layers is own
    with pytest.raises(NotImplementedError, match="requires identifiable"):
        own(config.model_config)


def test_bert_is_refused_at_the_configuration(tmp_path):
    model = tiny_models.make_config("bert", "BertModel", tmp_path)
    with pytest.raises(ValueError, match="keeps none between steps; leave --kv-cache-dtype away for it"):
        made(model=str(model))


def test_options_in_a_configuration_made_otherwise_are_an_error():
    """They act where EngineArgs makes it; a worker is the first that sees another one."""
    options = {"turboquant": {"skip_layers": [3], "sliding_window": 64}}
    config = made(additional_config=options)
    assert config.cache_config.sliding_window == 64
    check_in_force(config.additional_config)
    parts = {field.name: getattr(config, field.name) for field in fields(config) if field.init}
    late = VllmConfig(**(parts | {"additional_config": options}))
    with pytest.raises(ValueError, match="sets skip_layers, sliding_window in a VllmConfig that was not made by"):
        TurboQuantMetadataBuilder(SimpleNamespace(block_size=16), [], late, torch.device("cpu"))
    check_in_force({"turboquant": {"current": "raw", "strict": False}})
    check_in_force(None)


def test_an_engine_without_a_compressed_cache_is_left_alone(monkeypatch):
    monkeypatch.setattr(serving, "declined", lambda: "a reason")
    config = made(
        kv_cache_dtype="auto", attention_backend="CPU_ATTN", additional_config={"turboquant": {"strict": True}}
    )
    assert config.attention_config.backend == AttentionBackendEnum.CPU_ATTN


def test_the_wrap_is_made_once():
    before = EngineArgs.create_engine_config
    register()
    assert EngineArgs.create_engine_config is before


def test_strict_turns_a_decline_into_an_error(monkeypatch):
    from vllm.platforms import current_platform

    monkeypatch.setattr(serving, "declined", lambda: "the kernels are not usable")
    with pytest.raises(ValueError, match="strict: the kernels are not usable"):
        made(additional_config={"turboquant": {"strict": True}})
    # On a CPU vLLM has no other kernel for such pages.
    with pytest.raises(ValueError, match="needs it on a CPU, and the kernels are not usable; run tq-check"):
        made()
    # Elsewhere vLLM's own meaning of the flags, with what it forces.
    config = made(kv_cache_dtype="auto", attention_backend=None)
    config.cache_config.cache_dtype, config.attention_config.flash_attn_version = DTYPE, 2
    monkeypatch.setattr(type(current_platform), "device_type", "cuda")
    assert patches.served_config(config, None).attention_config.flash_attn_version == 2


def test_a_class_that_took_our_place_is_noticed(monkeypatch):
    monkeypatch.setattr(AttentionBackendEnum, "get_path", lambda self, *_: "other.Backend")
    with pytest.raises(ValueError, match=r"stands for other\.Backend"):
        made(additional_config={"turboquant": {"strict": True}})


def test_layers_that_share_a_cache_keep_the_native_one_together():
    """Gemma 4 E4B as published: 42 layers, every sixth with full attention, the last 18 reading the caches of 22 and 23."""
    from transformers import Gemma4TextConfig

    text = Gemma4TextConfig(num_hidden_layers=42, num_kv_shared_layers=18)
    boundary = ["0", "1", "40", "41"]  # vLLM's own choice
    skipped = [int(i) for i in aligned_skip_layers(text, boundary)]
    assert skipped == [0, 1, 22, 23, *range(24, 42)]
    assert not {5, 11, 17} & set(skipped) and {text.layer_types[i] for i in (5, 11, 17)} == {"full_attention"}
    assert aligned_skip_layers(text, []) == []
    assert aligned_skip_layers(text, ["sliding_window", "23"]) == ["23", "29", "35", "41", "sliding_window"]
    with pytest.raises(ValueError, match="layers go from 0 to 41"):
        aligned_skip_layers(text, ["42"])


def test_a_model_without_shared_caches_keeps_its_skip_list():
    from transformers import LlamaConfig

    assert aligned_skip_layers(LlamaConfig(num_hidden_layers=4), ["0", "99", "sliding_window"]) == [
        "0",
        "99",
        "sliding_window",
    ]


def refused(**changes):
    model = SimpleNamespace(
        use_mla=False,
        is_encoder_decoder=False,
        attn_type="decoder",
        get_total_num_kv_heads=lambda: changes.get("heads", 8),
    )
    model.__dict__.update({k: v for k, v in changes.items() if k in model.__dict__})
    parallel = SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1, tensor_parallel_size=1)
    parallel.__dict__.update({k: v for k, v in changes.items() if k in parallel.__dict__})
    return engine_config.refusal(
        SimpleNamespace(model_config=model, parallel_config=parallel, cache_config=SimpleNamespace(cache_dtype=DTYPE))
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_mla": True}, "MLA attention"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"attn_type": "encoder_only"}, "leave --kv-cache-dtype away"),
        ({"attn_type": "attention_free"}, "no layer of this model has any; leave --kv-cache-dtype away"),
        ({"decode_context_parallel_size": 2}, "decode_context_parallel_size is 2"),
        ({"prefill_context_parallel_size": 2}, "prefill_context_parallel_size is 2"),
        ({"heads": 6, "tensor_parallel_size": 4}, "6 KV heads cannot be divided among tensor_parallel_size 4"),
    ],
    ids=lambda x: "+".join(x) if isinstance(x, dict) else "",
)
def test_what_is_not_served_is_refused_before_a_model_is_loaded(changes, words):
    assert words in refused(**changes)


def test_heads_that_divide_or_are_repeated_are_served():
    for heads, ranks in ((8, 1), (8, 4), (2, 4)):
        assert refused(heads=heads, tensor_parallel_size=ranks) is None


def test_another_platform_is_refused(monkeypatch):
    from vllm import platforms

    other = SimpleNamespace(is_cpu=lambda: False, is_cuda_alike=lambda: False, device_name="xpu")
    monkeypatch.setattr(platforms, "_current_platform", other)
    assert "no kernels for xpu" in refused()


def test_the_stock_cpu_platform_is_refused(monkeypatch):
    """VLLM_PLUGINS=tq_backend leaves out our platform plugin; the stock one computes nonsense over a packed cache."""
    from vllm import platforms
    from vllm.platforms.cpu import CpuPlatform

    monkeypatch.setattr(platforms, "_current_platform", CpuPlatform())
    assert "CpuPlatform is in use" in refused() and "tq_backend_cpu" in refused()


def test_a_window_that_no_layer_would_take_is_noticed(warnings_said):
    asked = SimpleNamespace(
        hf_overrides={"sliding_window": 64}, hf_text_config=SimpleNamespace(layer_types=["full_attention"])
    )
    engine_config._set_window(
        SimpleNamespace(cache_config=SimpleNamespace(sliding_window=None), model_config=asked), None
    )
    assert len(warnings_said) == 1 and "set additional_config['turboquant']['sliding_window']" in warnings_said[0]
    layers = {"a": SimpleNamespace(impl=SimpleNamespace(sliding_window=0))}
    with pytest.raises(NotImplementedError, match="leaves a without a window"):
        check_window(layers, 64)
    check_window(layers, None)


OTHER_PLUGIN = "def register():\n    from vllm import a_name_that_is_gone\n"


def test_another_plugin_is_named_before_it_brings_the_engine_down(tmp_path):
    """As turboquant-vllm 1.5.0 does with vLLM 0.33: its entry point raises, and vLLM does not catch that."""
    info = tmp_path / "turboquant_vllm-1.5.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: turboquant-vllm\nVersion: 1.5.0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nturboquant = other_turboquant:register\n")
    (tmp_path / "other_turboquant.py").write_text(OTHER_PLUGIN)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    code = f"from vllm.engine.arg_utils import EngineArgs; EngineArgs(model={str(MODEL)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path}
    )
    said = done.stdout + done.stderr
    assert done.returncode != 0 and "a_name_that_is_gone" in said, said
    named = said.find("turboquant-vllm 1.5.0 also hooks TurboQuant into vLLM")
    assert 0 <= named < said.find("Traceback"), said
    assert "pip uninstall turboquant-vllm" in said
    assert conflicts.competitors() == []


@contextlib.contextmanager
def listening(name: str, level: int):
    said: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(level)
    yield said
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.fixture
def warnings_said():
    tolerance._say.cache_clear()
    with listening("vllm.tq_backend", logging.WARNING) as said:
        yield said


@pytest.fixture
def lines_said():
    """vLLM's lines and ours, in their order."""
    with listening("vllm", logging.INFO) as said:
        yield said


def test_keywords_of_a_newer_engine_are_passed_over_with_one_line_each(warnings_said):
    new = {"tq_slot_size": 134}
    config = AttentionSelectorConfig(128, torch.bfloat16, DTYPE, None)._asdict()
    spec = SimpleNamespace(state_content_bytes=70, block_size=16)
    vllm_config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={}),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=16, max_num_seqs=1),
        model_config=SimpleNamespace(is_mm_prefix_lm=False),
        additional_config={},
    )
    ints = torch.zeros(1, dtype=torch.int32)
    common = SimpleNamespace(
        num_actual_tokens=0, query_start_loc=ints, seq_lens=ints, block_table_tensor=ints, slot_mapping=ints, max_query_len=1,
        causal=True,
    )  # fmt: skip
    no_cache, x = torch.empty(0, dtype=torch.uint8), torch.zeros(1, 1, 64)
    for _ in range(2):
        capability = DeviceCapability(9, 0)
        assert TurboQuantBackend.validate_configuration(device_capability=capability, **config, **new) == []
        impl = TurboQuantImpl(1, 64, 1.0, 1, kv_cache_dtype=DTYPE, **new)
        builder = TurboQuantMetadataBuilder(spec, [], vllm_config, torch.device("cpu"), **new)
        builder.build(0, common, **new)
        impl.do_kv_cache_update(None, x, x, no_cache, ints, **new)
        impl.forward(None, x, x, x, no_cache, None, x, **new)
    places = [
        "validate_configuration",
        "an attention layer",
        "a metadata builder",
        "build",
        "do_kv_cache_update",
        "forward",
    ]
    told = "TURBOQUANT ignores what this vLLM gives to {} and it does not know: tq_slot_size"
    assert warnings_said == [told.format(place) for place in places]


SELECTION = """
import sys, types
# The CUDA platform's file opens kernels that this engine was built without; choosing a backend calls none of them.
sys.modules["vllm._C_stable_libtorch"] = types.ModuleType("vllm._C_stable_libtorch")
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.cuda import CudaPlatform
from vllm.platforms.interface import DeviceCapability
from vllm.plugins import load_general_plugins
from vllm.v1.attention.selector import AttentionSelectorConfig
from tq_backend.register import register
register()
args = EngineArgs(model={model!r}, kv_cache_dtype="turboquant_4bit_nc", attention_backend="TURBOQUANT")
selected = args.create_engine_config().attention_config.backend
for capability in ((7, 5), (8, 0), (9, 0), (10, 0), (12, 0)):
    CudaPlatform.get_device_capability = classmethod(lambda cls, *_: DeviceCapability(*capability))
    for dtype in ("auto", "turboquant_4bit_nc"):
        config = AttentionSelectorConfig(128, torch.float16, dtype, None)
        print("chosen", dtype, CudaPlatform.get_attn_backend_cls(selected, config))
"""


def test_the_cuda_platform_chooses_per_layer_under_an_explicit_flag():
    """Its own selection, with the compute capability of five devices; vLLM's own answer for "auto" layers is an error."""
    done = subprocess.run(
        [sys.executable, "-c", SELECTION.format(model=str(MODEL))], capture_output=True, text=True, check=False
    )
    chosen = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("chosen ")]
    assert len(chosen) == 10, done.stdout + done.stderr
    for dtype, path in chosen:
        assert (path == BACKEND_PATH) == (dtype == DTYPE), chosen
