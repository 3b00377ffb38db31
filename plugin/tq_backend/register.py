"""Entry points of vLLM: called in the front end, the engine core and every worker, without a guard around them.

So neither function raises, both may be called any number of times, and neither initialises CUDA. What cannot be served is
declined with one warning line, and the engine goes on as if this package were not installed.
"""

from __future__ import annotations

import logging
from typing import Any

BACKEND_PATH = "tq_backend.vllm_adapter.backend.TurboQuantBackend"
CPU_PLATFORM_PATH = "tq_backend.vllm_adapter.platform.TurboQuantCpuPlatform"

# vLLM configures the "vllm" logger tree; lines of a logger outside it would not be seen.
logger = logging.getLogger("vllm.tq_backend")


# Why register() declined in this process, "" if it did not; strict_or_not reads it.
_declined = ""


def register() -> None:
    """`vllm.general_plugins`: puts our class behind AttentionBackendEnum.TURBOQUANT, unless a probe fails."""
    global _declined  # noqa: PLW0603
    try:
        _declined = _register()
    except Exception as error:  # an engine must start whatever is wrong with this package
        _declined = f"{type(error).__name__}: {error}"
    if not _declined:
        return
    logger.warning("tq-backend declines: %s; the flags turboquant_* keep vLLM's own meaning in this run", _declined)
    try:
        _keep_strict()
    except Exception as error:
        logger.error("tq-backend cannot stop this vLLM where strict is set: %s: %s", type(error).__name__, error)


def _register() -> str:
    """Returns why it declines, "" if it does not."""
    from tq_backend.vllm_adapter import patches, probes

    unmet = probes.unmet()
    patches.declined[:] = unmet
    try:
        patches.apply()  # when we decline too: `strict` turns that into an error
    except Exception as error:  # one wrap may have been made, and gives the reason
        patches.declined.append(f"{type(error).__name__}: {error}")
        raise
    if unmet:
        return "; ".join(unmet)
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.TURBOQUANT, BACKEND_PATH)
    return ""


def strict_or_not(vllm_config: Any) -> None:
    """Raises ValueError for an engine that must not start without us. Needs nothing of this package, which may be what is broken."""
    options = (
        vllm_config.additional_config.get("turboquant") if isinstance(vllm_config.additional_config, dict) else None
    )
    strict = isinstance(options, dict) and options.get("strict") is True
    if strict and _declined and str(vllm_config.cache_config.cache_dtype).startswith("turboquant_"):
        raise ValueError(f"tq-backend, strict: {_declined}")


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
