"""The ledger: everything of the engine that this package changes at run time. No other file replaces anything of vLLM's, but
register.py where this one cannot, so that `strict` stops an engine even then, and serving.py, which registers our class.

Each wrap runs in every engine, so each asks one question first: does a configuration among the arguments have a turboquant_* cache?
If not, vLLM's own function is called with what came, and nothing else of this package runs. A wrap is not made where the engine
has no function of that name; interface.py says what that means to an engine that asks.

EngineArgs.create_engine_config
  What:  wrapped. Its result is checked and adjusted (engine_config.py) if the cache dtype is turboquant_*, and is returned
         untouched otherwise.
  Why:   vLLM 0.32 and 0.33 have no hook between the flags and the configuration. Without one, an explicit --attention-backend
         TURBOQUANT raises on CUDA for every layer with a native cache, FlashAttention 2 is forced on those layers, and options and
         refusals have no place where they would stop the engine before it loads a model.
  Probe: the method exists; otherwise apply() raises, register() declines with that line, and TURBOQUANT stays vLLM's.
  Goes:  when vLLM chooses attention backends per layer under an explicit flag and stops forcing FlashAttention 2.

Platform.get_attn_backend_cls, of the platform in use
  What:  wrapped. Before the first layer of an engine that asks chooses its backend, our class is put behind TURBOQUANT.
  Why:   workers get a configuration that the front end made, and vLLM loads plugins in them before it shows it. A class that
         is registered there and then is imported and asked in every engine: on CUDA TURBOQUANT is a candidate for each layer.
  Probe: the method exists; otherwise an engine that asks is declined.
  Goes:  when vLLM hands a general plugin the configuration.

get_kv_cache_groups (v1/core/kv_cache_planning.py, in vLLM 0.32 v1/core/kv_cache_utils.py)
  What:  wrapped. With a compressed layer among them, the layers' specs get the planner's block sizes and paddings (page_plan.py)
         before they are grouped; the grouping itself, and every engine without such a layer, stays vLLM's.
  Why:   a layer's spec is made where the other layers are not known, and vLLM then pads compressed pages up to native ones.
         0.33's KVCacheConfigBuilder is chosen by the platform, so it would take a platform class for each kind of GPU.
  Probe: one of the two modules has the function; otherwise an engine that asks is declined.
  Goes:  when vLLM unifies page sizes by block sizes with a common multiple, or a plugin can name the KVCacheConfigBuilder.

Platform._align_heterogeneous_kv_block_size
  What:  wrapped. Does nothing for an engine whose turboquant_* cache we serve.
  Why:   before any layer is known it raises the block size and names one page size for all windows, compressed ones too, from
         the first layer's backend. The planner needs the pages as they are, and an assertion fails where the guess is too small.
  Probe: none is needed: where the method is gone there is nothing to undo.
  Goes:  with the one above.

TurboQuantConfig.get_boundary_skip_layers
  What:  replaced while the configuration of an engine that we serve is made: no layer of a hybrid is skipped, as vLLM has it, and
         none has to be named; and where the engine chose a format of ours only those whose key bias it does not hold (accuracy.py).
  Why:   vLLM looks for a list of layer types in the model's configuration and raises where there is none. Falcon-H1 has attention
         in every layer and no such list. What is compressed is seen when the layers have made their specs (coverage.py). The list
         protects answers from vLLM's presets by layers' places, not by what they hold; it costs memory, and formats of ours do not need it.
  Probe: the method exists; otherwise an engine that asks is declined.
  Goes:  when vLLM asks the layers.

Attention.__init__
  What:  wrapped, once vLLM has derived a class from our backend for layers that attend in chunks. Such a layer gets the backend of
         its own cache dtype, and vLLM's class for chunks is derived from that.
  Why:   ChunkedLocalAttention (Llama 4) takes its backend from the engine's cache dtype, before vLLM decides that a layer keeps the
         native cache: ours would get that layer. Its own __init__ is running when the first class is derived, so it is too late to
         wrap it, and at registration its module, which takes a second, would be imported in every engine.
  Probe: TurboQuantImpl refuses a layer with a native cache.
  Goes:  when ChunkedLocalAttention asks whether its layer is skipped.

process_weights_after_loading, as the loaders (model_loader/base_loader.py, weight_cache/ipc_loader.py) call it, and
finalize_layerwise_processing (model_loader/reload/layerwise.py)
  What:  wrapped, once a layer of ours has a format that takes an offset from its keys. Then each such layer gets it
         (key_offsets.py); when weights are loaded again it is written anew.
  Why:   the offset comes from the bias of a projection and from a rotary embedding, and vLLM tells an attention layer of neither:
         only what is called with the whole model sees the modules beside it. vLLM's own hook on a model is the model's.
  Probe: both exist, and the modules that are asked are what they were; otherwise there are no offsets, and one line says so.
  Goes:  when vLLM calls AttentionImpl.process_weights_after_loading with the layer's neighbours, or a plugin after loading.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

from tq_backend.names import LOGGER, asks, is_ours
from tq_backend.vllm_adapter import serving

logger = logging.getLogger(LOGGER)

MARK = "_tq_backend_wraps"


def checked_config(create: Callable[..., Any], engine_args: Any, *args: Any, **kwargs: Any) -> Any:
    """create_engine_config with our part behind it. Raises ValueError where an engine with a turboquant_* cache must not start."""
    ours = is_ours(getattr(engine_args, "kv_cache_dtype", None))
    with default_skip_layers(engine_args) if ours else contextlib.nullcontext():
        config = create(engine_args, *args, **kwargs)
    return served_config(config, engine_args) if asks(config) else config


def served_config(config: Any, engine_args: Any) -> Any:
    """The configuration of an engine that asks, checked and adjusted."""
    from vllm.platforms import current_platform

    from tq_backend.vllm_adapter import conflicts, engine_config, formats, interface
    from tq_backend.vllm_adapter.options import CREATED, read_options

    options = read_options(getattr(config, "additional_config", None))
    reason, others = serving.not_ours(), conflicts.competitors()
    if options.strict and (reason or others):
        raise ValueError(f"tq-backend, strict: {reason or conflicts.sentence(others)}")
    if (
        reason and getattr(current_platform, "device_type", "") == "cpu"
    ):  # where vLLM's own kernel would read packed bytes
        raise ValueError(f"tq-backend: {config.cache_config.cache_dtype} needs it on a CPU, and {reason}; run tq-check")
    if reason:
        logger.warning("tq-backend does not serve this engine: %s", reason)
        return config
    formats.use(config)
    refused = engine_config.refusal(config) or interface.images_refusal(config.model_config)
    if refused:
        raise ValueError(f"tq-backend: {refused}")
    engine_config.adjust(config, options, engine_args.attention_config.flash_attn_version)
    if isinstance(config.additional_config, dict):
        config.additional_config = {**config.additional_config, CREATED: True}  # reaches the workers
    return config


@contextlib.contextmanager
def default_skip_layers(engine_args: Any) -> Iterator[None]:
    """See the ledger, TurboQuantConfig."""
    if serving.not_ours():
        yield
        return
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

    from tq_backend.vllm_adapter import accuracy
    from tq_backend.vllm_adapter.options import read_options

    options = read_options(getattr(engine_args, "additional_config", None))
    chosen = options.format
    own = TurboQuantConfig.get_boundary_skip_layers

    def named_or_not(model_config: Any, *args: Any, **kwargs: Any) -> list[str]:
        if model_config.is_hybrid or options.skip_layers is not None:  # what the user names takes the place of any list
            return []
        if chosen is not None and not is_ours(chosen):
            return [str(layer) for layer in accuracy.native_by_default(chosen, engine_args, model_config)]
        return own(model_config, *args, **kwargs)

    TurboQuantConfig.get_boundary_skip_layers = staticmethod(named_or_not)
    try:
        yield
    finally:
        TurboQuantConfig.get_boundary_skip_layers = staticmethod(own)


def planning_module() -> Any:
    """Where this vLLM groups layers: its get_kv_cache_groups is looked up there at each call."""
    try:
        from vllm.v1.core import kv_cache_planning as planning
    except ImportError:
        from vllm.v1.core import kv_cache_utils as planning
    return planning


def unwrapped(function: Any) -> Any:
    """The engine's own function, whether it is wrapped or not."""
    return getattr(function, MARK, function)


def wrap(owner: Any, name: str, around: Callable[..., Any], bind: Callable[..., Any] = lambda f: f) -> None:
    """Puts around(own, ...) in the place of owner's function `name`, once; nothing if there is none."""
    own = getattr(owner, name, None)
    if own is None or hasattr(own, MARK):
        return
    inner = getattr(own, "__func__", own)

    @functools.wraps(inner)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(inner, *args, **kwargs)

    setattr(wrapped, MARK, inner)
    setattr(owner, name, bind(wrapped))


def selected_backend(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    if asks(config) and not serving.not_ours():  # registers; why not, if not, is in the log
        from tq_backend.vllm_adapter import formats

        formats.use(config)
    return own(*args, **kwargs)


def planned_groups(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not any(map(asks, (*args, *kwargs.values()))) or serving.not_ours():
        return own(*args, **kwargs)
    return _planned(own, *args, **kwargs)


def _planned(own: Callable[..., Any], vllm_config: Any, kv_cache_spec: dict[str, Any], *rest: Any, **more: Any) -> Any:
    """Of an engine that asks. What a newer vLLM gives besides goes through."""
    from tq_backend.vllm_adapter import formats, page_plan

    formats.use(vllm_config)

    def engines(config: Any, specs: dict[str, Any]) -> Any:
        return own(config, specs, *rest, **more)

    return page_plan.grouped(engines, vllm_config, kv_cache_spec)


def no_alignment(own: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    if not any(map(asks, (*args, *kwargs.values()))) or serving.not_ours():
        own(*args, **kwargs)


def backend_of_the_layer(
    ours: type, own: Callable[..., None], layer: Any, *args: Any, attn_backend: Any = None, **kwargs: Any
) -> None:
    chunk = getattr(layer, "attention_chunk_size", None)
    if chunk is None or attn_backend is None or not issubclass(attn_backend, ours):
        own(layer, *args, attn_backend=attn_backend, **kwargs)
        return
    from vllm.model_executor.layers.attention.chunked_local_attention import create_chunked_local_attention_backend

    own(layer, *args, **kwargs)  # chooses by the layer's own cache dtype
    layer.attn_backend = create_chunked_local_attention_backend(layer.attn_backend, chunk)


def apply_to_chunks(ours: type) -> None:
    """When vLLM derives a class from our backend: the first sign of an engine with such layers."""
    from vllm.model_executor.layers.attention import Attention

    wrap(Attention, "__init__", functools.partial(backend_of_the_layer, ours))


@functools.cache
def apply_to_loading(ours: type) -> None:
    """When the first layer wants an offset: the loaders' modules are imported by then."""
    from tq_backend.vllm_adapter import interface, key_offsets

    if lacking := interface.unmet(interface.Without.OFFSET):
        logger.warning("tq-backend takes no offsets from keys: %s", "; ".join(lacking))
        return
    from vllm.model_executor.model_loader import base_loader
    from vllm.model_executor.model_loader.reload import layerwise
    from vllm.model_executor.model_loader.weight_cache import ipc_loader

    for loader in (base_loader, ipc_loader):
        wrap(loader, "process_weights_after_loading", functools.partial(key_offsets.loaded, ours))
    wrap(layerwise, "finalize_layerwise_processing", functools.partial(key_offsets.reloaded, ours))


def apply() -> None:
    """Any number of times; each wrap is made once. Raises AttributeError if no engine that asks could be noticed."""
    from vllm import config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.platforms.interface import Platform

    if not hasattr(EngineArgs, "create_engine_config"):
        raise AttributeError("this vLLM's EngineArgs has no create_engine_config")
    if not hasattr(config.CacheConfig, "cache_dtype"):
        raise AttributeError("this vLLM's CacheConfig has no cache_dtype")
    wrap(EngineArgs, "create_engine_config", checked_config)
    if hasattr(config, "get_current_vllm_config_or_none"):
        wrap(type(current_platform), "get_attn_backend_cls", selected_backend, classmethod)
    wrap(planning_module(), "get_kv_cache_groups", planned_groups)
    wrap(Platform, "_align_heterogeneous_kv_block_size", no_alignment, classmethod)
