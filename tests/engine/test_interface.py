"""Every name of vLLM that the adapter touches, taken away from the installed engine one at a time: an engine that asks gets one
sentence that names it, and a decline, a refusal or the path that the table promises; one that does not ask notices nothing."""

from __future__ import annotations

import ast
import contextlib
import enum
import importlib
import inspect
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tq_backend
import vllm
from engines import MODEL, ROOT
from tq_backend import key_bias
from tq_backend import register as entry_points
from tq_backend.vllm_adapter import accuracy, interface, page_plan, patches, prefill, serving
from tq_backend.vllm_adapter.backend import TurboQuantBackend
from tq_backend.vllm_adapter.impl import TurboQuantImpl
from tq_backend.vllm_adapter.interface import NEEDS, Kind, Need, Without
from tq_backend.vllm_adapter.metadata import TurboQuantMetadataBuilder
from vllm.engine.arg_utils import EngineArgs

DTYPE = "turboquant_4bit_nc"
ADAPTER = Path(tq_backend.__file__).parent


def cases(without: Without) -> list:
    return [
        pytest.param(need, name, id=f"{interface.title(need.of)}.{name}")
        for need in NEEDS
        if need.without is without
        for name in need.names
    ]


@contextlib.contextmanager
def flash_attention_module(patch: pytest.MonkeyPatch):
    """vLLM's interface to FlashAttention as it is installed. Its package refuses to be imported without compiled kernels."""
    package = types.ModuleType("vllm.vllm_flash_attn")
    package.__path__ = [str(Path(vllm.__file__).parent / "vllm_flash_attn")]
    patch.setitem(sys.modules, "vllm.vllm_flash_attn", package)
    module = importlib.import_module("vllm.vllm_flash_attn.flash_attn_interface")
    patch.setitem(sys.modules, module.__name__, module)
    yield module
    del sys.modules[module.__name__]


def owner_of(of: str) -> tuple[object, str]:
    """What holds the object, and its name there."""
    alternative = next(x for x in of.split("|") if interface.found(x) is not None)
    module, _, path = alternative.partition(":")
    *outer, name = path.split(".")
    return interface.found(f"{module}:{'.'.join(outer)}"), name


def take_member(patch: pytest.MonkeyPatch, need: Need, name: str) -> None:
    thing = interface.found(need.of)
    if inspect.isclass(thing) and issubclass(thing, enum.Enum) and name in thing.__members__:
        others = {member: value.value for member, value in thing.__members__.items() if member != name}
        patch.setattr(*owner_of(need.of), enum.Enum(thing.__name__, others))
        return
    for holder in inspect.getmro(thing) if inspect.isclass(thing) else [thing]:
        if name in vars(holder):
            patch.delattr(holder, name)
        if name in vars(holder).get("__annotations__", {}):
            patch.delitem(holder.__annotations__, name)


def take_away(patch: pytest.MonkeyPatch, need: Need, name: str) -> None:
    if need.kind is Kind.MEMBER:
        take_member(patch, need, name)
        return
    function = inspect.unwrap(interface.found(need.of))
    if need.kind is Kind.USES:
        code = function.__code__
        others = code.replace(co_names=tuple("renamed" if x == name else x for x in code.co_names))
        stand_in = types.FunctionType(others, function.__globals__, function.__name__, None, function.__closure__)
    else:
        known = inspect.signature(function)
        renamed = [p.replace(name="renamed" if p.name == name else p.name) for p in known.parameters.values()]

        def stand_in(*_args, **_kwargs):
            raise AssertionError("only its signature is read")

        stand_in.__signature__ = known.replace(parameters=renamed)
    patch.setattr(*owner_of(need.of), stand_in)


@pytest.fixture(scope="module")
def config():
    """Of an engine that does not ask, until a test gives it a compressed cache."""
    patches.apply()
    return EngineArgs(model=str(MODEL), kv_cache_dtype="auto").create_engine_config()


@pytest.fixture
def asking(config, monkeypatch):
    monkeypatch.setattr(config.cache_config, "cache_dtype", DTYPE)
    serving.declined.cache_clear()
    yield config
    serving.declined.cache_clear()


def start(config) -> None:
    """What the wrapped create_engine_config does with a configuration. It changes nothing where it raises."""
    patches.checked_config(lambda _args: config, SimpleNamespace(attention_config=config.attention_config))


def test_this_vllm_has_all_of_it():
    for without in Without:
        with pytest.MonkeyPatch.context() as patch, flash_attention_module(patch):
            assert interface.unmet(without) == []


@pytest.mark.parametrize(("need", "name"), cases(Without.DECLINE))
def test_what_is_gone_declines(asking, need, name):
    with pytest.MonkeyPatch.context() as patch:
        take_away(patch, need, name)
        with pytest.raises(ValueError) as raised:  # on a CPU; elsewhere it is a warning: test_engine_config.py
            start(asking)
    said = str(raised.value)
    assert f"this vLLM's {interface.title(need.of)} " in said and re.search(rf"\b{name}\b", said), said
    assert said.startswith(f"tq-backend: {DTYPE} needs it on a CPU, and this vLLM's ") and said.endswith(
        "; run tq-check"
    )


def test_a_parameter_in_between_declines(asking, monkeypatch):
    """vLLM gives an implementation its arguments by position."""
    need = next(x for x in NEEDS if x.of.endswith("AttentionImpl.__init__"))
    known = inspect.signature(interface.found(need.of))
    first = list(known.parameters.values())
    more = [*first[:4], inspect.Parameter("is_new", inspect.Parameter.POSITIONAL_OR_KEYWORD), *first[4:]]

    def stand_in():
        raise AssertionError("only its signature is read")

    stand_in.__signature__ = known.replace(parameters=[p.replace(default=inspect.Parameter.empty) for p in more])
    monkeypatch.setattr(*owner_of(need.of), stand_in)
    with pytest.raises(
        ValueError, match=r"AttentionImpl\.__init__ does not take in its place num_kv_heads, alibi_slopes,"
    ):
        start(asking)


@pytest.mark.parametrize(("need", "name"), cases(Without.IMAGES))
def test_images_are_refused_and_never_made_causal(asking, need, name):
    with pytest.MonkeyPatch.context() as patch:
        take_away(patch, need, name)
        images = SimpleNamespace(is_mm_prefix_lm=True)
        assert interface.images_refusal(SimpleNamespace(is_mm_prefix_lm=False)) == ""
        assert name in interface.images_refusal(images)
        patch.setattr(type(asking.model_config), "is_mm_prefix_lm", property(lambda _self: True))
        with pytest.raises(
            ValueError, match=f"images of this model would be attended wrongly: this vLLM's .* {name}, "
        ):
            start(asking)
        # A configuration that EngineArgs did not make is met here first.
        with pytest.raises(NotImplementedError, match=name):
            TurboQuantMetadataBuilder(
                SimpleNamespace(block_size=16), [], SimpleNamespace(additional_config={}, model_config=images), None
            )


@pytest.mark.parametrize(("need", "name"), cases(Without.PREFILL))
def test_prefills_run_by_our_own_kernel(need, name):
    """The sentence is what a builder says once, and it then gives the layer no route: test_impl.py."""
    with pytest.MonkeyPatch.context() as patch, flash_attention_module(patch) as module:
        patch.setattr(module, "is_fa_version_supported", lambda _version: True)
        assert prefill._missing(3) is None
        take_away(patch, need, name)
        assert re.search(rf"this vLLM's .*\b{name}\b", prefill._missing(3))


def specs() -> dict:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec, get_kv_quant_mode

    shape = {"block_size": 32, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
    compressed = {"kv_quant_mode": get_kv_quant_mode(DTYPE)}
    return {
        "full": TurboQuantBackend.customize_spec(FullAttentionSpec(**shape | compressed)),
        "window": TurboQuantBackend.customize_spec(SlidingWindowSpec(sliding_window=64, **shape | compressed)),
        "native": FullAttentionSpec(**shape),
        "state": MambaSpec(block_size=32, shapes=((4, 64),), dtypes=(torch.float32,)),
    }


@pytest.mark.parametrize(("need", "name"), cases(Without.PAGES))
def test_page_sizes_are_left_to_vllm(asking, need, name):
    said, given = [], specs()
    if name == "user_specified_block_size":  # states leave no choice
        del given["state"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_plan, "say", lambda _level, line: said.append(line))
        for holder in (asking, asking.cache_config, asking.scheduler_config, asking.model_config):
            patch.setattr(holder, "__dict__", dict(holder.__dict__))
        assert page_plan.grouped(lambda _config, specs: [specs] * 3, asking, given)[0] is not given, said
        said.clear()
        take_away(patch, need, name)
        for holder in (asking, asking.cache_config, asking.scheduler_config, asking.model_config, *given.values()):
            holder.__dict__.pop(name, None)  # a field of an instance
        assert page_plan.grouped(lambda _config, specs: specs, asking, given) is given
    left = [line for line in said if line.startswith("leaves the page sizes to vLLM: ")]
    assert len(left) == 1 and name in left[0], said


@pytest.mark.parametrize(("need", "name"), cases(Without.EARLY))
def test_a_model_from_a_hub_is_read_when_it_is_loaded(asking, monkeypatch, need, name):
    monkeypatch.setattr(asking.model_config, "model", "of/a-hub")
    monkeypatch.setattr(asking.model_config.hf_text_config, "attention_bias", True, raising=False)
    take_away(monkeypatch, need, name)
    assert accuracy.native_by_default("tq_4", asking.load_config, asking.model_config) == []


@pytest.mark.parametrize(("need", "name"), cases(Without.NOTICE))
def test_a_model_is_not_named(asking, monkeypatch, need, name):
    given = {"model.layers.0.self_attn.attn": specs()["full"]}
    monkeypatch.setattr(key_bias, "read", lambda _folder, _heads: [key_bias.KeyBias(0, 900.0, 800.0, 900.0)])
    monkeypatch.setattr(asking.model_config, "model", "of/a-hub")  # so that all is read
    assert "key bias 900 in layer 0" in accuracy.line(asking, given)
    with pytest.MonkeyPatch.context() as patch:
        take_away(patch, need, name)
        for holder in (asking, asking.load_config, asking.model_config):
            patch.setattr(holder, "__dict__", {k: x for k, x in holder.__dict__.items() if k != name})
        assert accuracy.line(asking, given) == ""


@pytest.mark.parametrize(("need", "name"), cases(Without.OFFSET))
def test_no_offset_is_taken_from_keys(monkeypatch, need, name):
    wrapped, said = [], []
    monkeypatch.setattr(patches, "wrap", lambda _owner, name, _around: wrapped.append(name))
    monkeypatch.setattr(patches.logger, "warning", lambda text, *args: said.append(text % args))
    apply = patches.apply_to_loading.__wrapped__  # which is done once in a process
    apply(TurboQuantImpl)
    assert wrapped == ["process_weights_after_loading"] * 2 + ["finalize_layerwise_processing"] and said == []
    wrapped.clear()
    with pytest.MonkeyPatch.context() as patch:
        take_away(patch, need, name)
        apply(TurboQuantImpl)
    assert wrapped == [] and len(said) == 1
    assert re.search(rf"^tq-backend takes no offsets from keys: this vLLM's .*\b{name}\b.*, needed to ", said[0]), said


@pytest.mark.parametrize(("need", "name"), cases(Without.PLATFORM))
def test_vllms_own_cpu_platform_stays(monkeypatch, need, name):
    """An engine with a compressed cache is refused under it: test_engine_config.py."""
    from vllm import platforms

    assert entry_points.cpu_platform() == entry_points.CPU_PLATFORM_PATH
    if name == "CpuPlatform":
        monkeypatch.setitem(platforms.builtin_platform_plugins, "cpu", lambda: "vllm.platforms.cpu.AnotherCpuPlatform")
    else:
        take_away(monkeypatch, need, name)
    assert entry_points.cpu_platform() is None


def test_what_needs_no_undoing():
    for need in NEEDS:
        if need.without is Without.NOTHING:
            with pytest.MonkeyPatch.context() as patch:
                for name in need.names:
                    take_away(patch, need, name)
                patches.apply()
                assert len(interface.unmet(Without.NOTHING)) == 1 and interface.unmet(Without.DECLINE) == []


class Changed:
    """Of a configuration: nothing of it is where it was."""


@pytest.mark.parametrize(
    "config",
    [
        None,
        Changed(),
        SimpleNamespace(cache_config=None),
        SimpleNamespace(cache_config=Changed()),
        SimpleNamespace(cache_config=SimpleNamespace(cache_dtype=None)),
        SimpleNamespace(cache_config=SimpleNamespace(cache_dtype=7)),
        SimpleNamespace(cache_config=SimpleNamespace(cache_dtype="fp8")),
    ],
)
def test_an_engine_that_does_not_ask_gets_what_vllm_makes(monkeypatch, config):
    """Whatever its configuration has become, and whatever vLLM gives to its functions."""
    from vllm import config as config_module

    def never(*_args):
        raise AssertionError("nothing of ours may run")

    monkeypatch.setattr(serving, "declined", never)
    monkeypatch.setattr(serving, "not_ours", never)
    monkeypatch.setattr(config_module, "get_current_vllm_config_or_none", lambda: config)
    assert patches.checked_config(lambda *_args, **_more: config, Changed(), 1, more=2) is config
    for around in (patches.planned_groups, patches.selected_backend, patches.no_alignment):
        seen = []
        around(lambda *args, seen=seen, **more: seen.append((args, more)), config, 1, more=2)
        assert seen == [((config, 1), {"more": 2})]


# How much of the adapter is in the table: all that it imports, overrides, and reads of vLLM's objects under their usual names.


def sources(*folders: str) -> list[tuple[str, ast.Module]]:
    files = [ADAPTER / "register.py", *(path for folder in folders for path in sorted((ADAPTER / folder).glob("*.py")))]
    return [(path.name, ast.parse(path.read_text())) for path in files]


def listed(of: str, kind: Kind | None = None) -> set[str]:
    rows = [need for need in NEEDS if of in need.of.split("|") and kind in (None, need.kind)]
    return {name for need in rows for name in need.names}


def test_all_imports_are_in_the_table():
    objects = {of for need in NEEDS for of in need.of.split("|")}
    missing = []
    for file, tree in sources("vllm_adapter"):
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("vllm"):
                continue
            for name in (alias.name for alias in node.names):
                module = f"{node.module}.{name}"
                if not (
                    name in listed(f"{node.module}:")
                    or any(of.startswith((f"{node.module}:{name}", f"{module}:")) for of in objects)
                    or (file, name) in NOT_IN_THE_TABLE
                ):
                    missing.append(f"{file}: {node.module}.{name}")
    assert missing == []


# Of what the configuration of an engine, here current_platform, is an instance of; and for a type annotation alone.
NOT_IN_THE_TABLE = {
    *((file, "current_platform") for file in ("patches.py", "probes.py", "engine_config.py", "page_plan.py")),
    ("backend.py", "DeviceCapability"),
}


@pytest.mark.parametrize(
    ("own", "of", "new"),
    [
        (TurboQuantBackend, "AttentionBackend", set()),
        # `do_kv_cache_update` is looked up by its name, and the base class has none; `set_pages` and `per_head_floats` are ours.
        (TurboQuantImpl, "AttentionImpl", {"do_kv_cache_update", "per_head_floats", "set_pages"}),
        (TurboQuantMetadataBuilder, "AttentionMetadataBuilder", set()),
    ],
)
def test_what_our_classes_override_is_in_the_table(own, of, new):
    overridden = {x for x in vars(own) if not x.startswith("__")} - new - {"_abc_impl"}
    overridden -= {x for x in overridden if x.startswith("_") and not hasattr(own.__mro__[1], x)}
    rows = listed(f"{interface.BACKEND}{of}", Kind.MEMBER)
    rows |= {need.of.rpartition(".")[2] for need in NEEDS if need.of.startswith(f"{interface.BACKEND}{of}.")}
    assert overridden <= rows, overridden - rows


READ = {
    "common": "vllm.v1.attention.backend:CommonAttentionMetadata",
    **{name: "vllm.config:CacheConfig" for name in ("cache", "cache_config")},
    **{name: "vllm.config:ModelConfig" for name in ("model", "model_config")},
    **{name: "vllm.config:ParallelConfig" for name in ("parallel", "parallel_config")},
    **{name: "vllm.config:SchedulerConfig" for name in ("scheduler", "scheduler_config")},
    "attention_config": "vllm.config:AttentionConfig",
    **{name: "vllm.config:VllmConfig" for name in ("vllm_config", "config")},
    "engine_args": "vllm.engine.arg_utils:EngineArgs",
    "current_platform": "vllm.platforms.interface:Platform",
}


def test_what_is_read_of_configurations_and_batches_is_in_the_table():
    missing = []
    for file, tree in sources("vllm_adapter"):
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute):
                continue
            holder = getattr(node.value, "id", getattr(node.value, "attr", None))
            if holder in READ and node.attr not in listed(READ[holder]) | {"CacheConfig"}:
                missing.append(f"{file}:{node.lineno} {holder}.{node.attr}")
    assert missing == []


def test_the_page_is_the_table():
    spec = importlib.util.spec_from_file_location("vllm_interface", ROOT / "ci" / "vllm_interface.py")
    script: Callable = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.page() == script.PAGE.read_text(), "run ci/vllm_interface.py"
