"""Entry points of vLLM: called in the front end, the engine core and every worker, without a guard around them.

So neither function raises, both may be called any number of times, neither initialises CUDA, and neither opens a shared library
of this package: most engines that call them have no turboquant_* cache. What such an engine could not run is found when its
configuration is made (vllm_adapter/patches.py).
"""

from __future__ import annotations

import logging
from typing import Any

from tq_backend.names import CPU_PLATFORM_PATH, LOGGER, asks

logger = logging.getLogger(LOGGER)


# Why register() failed in this process, "" if it did not; strict_or_not reads it.
_failed = ""


def register() -> None:
    """`vllm.general_plugins`: puts our part behind the making of an engine's configuration."""
    global _failed  # noqa: PLW0603
    try:
        from tq_backend.vllm_adapter import patches

        patches.apply()
        _failed = ""
        return
    except Exception as error:  # an engine must start whatever is wrong with this package
        _failed = f"{type(error).__name__}: {error}"
    # No engine that asks would be noticed any more, so this is said now and to all.
    logger.warning("tq-backend declines: %s; the flags turboquant_* keep vLLM's own meaning in this run", _failed)
    try:
        _keep_strict()
    except Exception as error:
        logger.error("tq-backend cannot stop this vLLM where strict is set: %s: %s", type(error).__name__, error)


def strict_or_not(vllm_config: Any) -> None:
    """Raises ValueError for an engine that must not start without us. Needs nothing of the adapter, which may be what is broken."""
    hidden = not hasattr(getattr(vllm_config, "cache_config", None), "cache_dtype")  # so it may ask for us
    if not _failed or not (asks(vllm_config) or hidden):
        return
    given = getattr(vllm_config, "additional_config", None)
    options = given.get("turboquant") if isinstance(given, dict) else None
    if isinstance(options, dict) and options.get("strict") is True:
        raise ValueError(f"tq-backend, strict: {_failed}")


def _keep_strict() -> None:
    """What is left of the adapter's checks where it could not make its own wraps: an engine with `strict` does not start. Wraps what
    makes an engine's configuration; in a vLLM without that method, what completes it."""
    import functools

    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

    owner, name = (EngineArgs, "create_engine_config")
    if not hasattr(owner, name):
        owner, name = VllmConfig, "__post_init__"
    own = getattr(owner, name)
    if hasattr(own, "_tq_backend_strict"):
        return

    @functools.wraps(own)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = own(self, *args, **kwargs)
        strict_or_not(self if made is None else made)
        return made

    checked._tq_backend_strict = True  # type: ignore[attr-defined]
    setattr(owner, name, checked)


def cpu_platform() -> str | None:
    """`vllm.platform_plugins`: our platform where vLLM's own answer would be the plain CPU platform, else None.

    Stock vLLM on a CPU ignores the requested attention backend and computes nonsense over a packed cache.

    vLLM asks here before it runs any general plugin, so this is also where a plugin that could bring it down is named in time.
    """
    try:
        from tq_backend.vllm_adapter import conflicts

        others = conflicts.competitors()
        if others:
            logger.warning("tq-backend: %s", conflicts.sentence(others))
        from vllm.platforms import builtin_platform_plugins

        found = {name: probe() for name, probe in builtin_platform_plugins.items()}
        if [path for path in found.values() if path] != ["vllm.platforms.cpu.CpuPlatform"]:
            return None
        return CPU_PLATFORM_PATH
    except Exception as error:  # see register()
        logger.warning("tq-backend leaves the CPU platform alone: %s: %s", type(error).__name__, error)
        return None
