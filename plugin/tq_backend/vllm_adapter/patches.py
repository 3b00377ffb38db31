"""The ledger: everything of the engine that this package changes at run time. No other file replaces anything of vLLM's.

EngineArgs.create_engine_config
  What:  wrapped. Its result is checked and adjusted (engine_config.py) if the cache dtype is turboquant_*, and is returned
         untouched otherwise.
  Why:   vLLM 0.32 and 0.33 have no hook between the flags and the configuration. Without one, an explicit --attention-backend
         TURBOQUANT raises on CUDA for every layer with a native cache, FlashAttention 2 is forced on those layers, and options and
         refusals have no place where they would stop the engine before it loads a model.
  Probe: the method exists; otherwise apply() raises, register() declines with that line, and TURBOQUANT stays vLLM's.
  Goes:  when vLLM chooses attention backends per layer under an explicit flag and stops forcing FlashAttention 2.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from tq_backend.register import BACKEND_PATH
from tq_backend.vllm_adapter import conflicts, engine_config
from tq_backend.vllm_adapter.options import read_options

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
    return config


def apply() -> None:
    """Any number of times; the wrap is made once. Raises AttributeError if the engine has no such method."""
    from vllm.engine.arg_utils import EngineArgs

    own = EngineArgs.create_engine_config
    if hasattr(own, MARK):
        return

    @functools.wraps(own)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        return checked_config(own, self, *args, **kwargs)

    setattr(create_engine_config, MARK, own)
    EngineArgs.create_engine_config = create_engine_config
