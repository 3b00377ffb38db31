"""The ledger: everything of the engine that this package changes at run time. No other file replaces anything of vLLM's, but
register.py where this one cannot: so that `strict` stops an engine even then.

EngineArgs.create_engine_config
  What:  wrapped. Its result is checked and adjusted (engine_config.py) if the cache dtype is turboquant_*, and is returned
         untouched otherwise.
  Why:   vLLM 0.32 and 0.33 have no hook between the flags and the configuration. Without one, an explicit --attention-backend
         TURBOQUANT raises on CUDA for every layer with a native cache, FlashAttention 2 is forced on those layers, and options and
         refusals have no place where they would stop the engine before it loads a model.
  Probe: the method exists; otherwise apply() raises, register() declines with that line, and TURBOQUANT stays vLLM's.
  Goes:  when vLLM chooses attention backends per layer under an explicit flag and stops forcing FlashAttention 2.

get_kv_cache_groups (v1/core/kv_cache_planning.py, in vLLM 0.32 v1/core/kv_cache_utils.py)
  What:  wrapped. With a compressed layer among them, the layers' specs get the planner's block sizes and paddings (page_plan.py)
         before they are grouped; the grouping itself, and every engine without such a layer, stays vLLM's.
  Why:   a layer's spec is made where the other layers are not known, and vLLM then pads compressed pages up to native ones.
         0.33's KVCacheConfigBuilder is chosen by the platform, so it would take a platform class for each kind of GPU.
  Probe: one of the two modules has the function; otherwise apply() raises, as above.
  Goes:  when vLLM unifies page sizes by block sizes with a common multiple, or a plugin can name the KVCacheConfigBuilder.

Platform._align_heterogeneous_kv_block_size
  What:  wrapped. Does nothing for an engine whose turboquant_* cache we serve.
  Why:   before any layer is known it raises the block size and names one page size for all windows, compressed ones too, from
         the first layer's backend. The planner needs the pages as they are, and an assertion fails where the guess is too small.
  Probe: none is needed: where the method is gone there is nothing to undo.
  Goes:  with the one above.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from tq_backend.register import BACKEND_PATH
from tq_backend.vllm_adapter import conflicts, engine_config, page_plan
from tq_backend.vllm_adapter.options import CREATED, read_options

logger = logging.getLogger("vllm.tq_backend")

MARK = "_tq_backend_wraps"
# Why register() declined in this process; empty if it did not.
declined: list[str] = []


def not_ours() -> str | None:
    """Why something else than our class would serve turboquant_* in this process; None if ours would."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    path = AttentionBackendEnum.TURBOQUANT.get_path()
    if declined:
        return "; ".join(declined)
    return None if path == BACKEND_PATH else f"AttentionBackendEnum.TURBOQUANT stands for {path}"


def checked_config(create: Callable[..., Any], engine_args: Any, *args: Any, **kwargs: Any) -> Any:
    """create_engine_config with our part behind it. Raises ValueError where an engine with a turboquant_* cache must not start."""
    version = getattr(engine_args.attention_config, "flash_attn_version", None)
    config = create(engine_args, *args, **kwargs)
    options = read_options(config.additional_config)
    if not config.cache_config.cache_dtype.startswith("turboquant_"):
        return config
    reason, others = not_ours(), conflicts.competitors()
    if options.strict and (reason or others):
        raise ValueError(f"tq-backend, strict: {reason or conflicts.sentence(others)}")
    if reason:
        logger.warning("tq-backend does not serve this engine: %s", reason)
        return config
    refused = engine_config.refusal(config)
    if refused:
        raise ValueError(f"tq-backend: {refused}")
    engine_config.adjust(config, options, version)
    if isinstance(config.additional_config, dict):
        config.additional_config = {**config.additional_config, CREATED: True}  # reaches the workers
    return config


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
    """Puts around(own, ...) in the place of owner's function `name`, once. Raises AttributeError if there is none."""
    own = getattr(owner, name)
    if hasattr(own, MARK):
        return
    inner = getattr(own, "__func__", own)

    @functools.wraps(inner)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(inner, *args, **kwargs)

    setattr(wrapped, MARK, inner)
    setattr(owner, name, bind(wrapped))


def planned_groups(own: Callable[..., Any], vllm_config: Any, kv_cache_spec: dict[str, Any]) -> Any:
    if not any(map(page_plan.is_compressed, kv_cache_spec.values())) or not_ours():
        return own(vllm_config, kv_cache_spec)
    return page_plan.grouped(own, vllm_config, kv_cache_spec)


def no_alignment(own: Callable[..., Any], platform: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    if not vllm_config.cache_config.cache_dtype.startswith("turboquant_") or not_ours():
        own(platform, vllm_config, *args, **kwargs)


def apply() -> None:
    """Any number of times; each wrap is made once. Raises AttributeError if the engine lacks what the ledger names."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms.interface import Platform

    wrap(EngineArgs, "create_engine_config", checked_config)
    wrap(planning_module(), "get_kv_cache_groups", planned_groups)
    if hasattr(Platform, "_align_heterogeneous_kv_block_size"):
        wrap(Platform, "_align_heterogeneous_kv_block_size", no_alignment, classmethod)
