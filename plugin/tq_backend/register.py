"""Entry points of vLLM: called in the front end, the engine core and every worker, without a guard around them.

So neither function raises, both may be called any number of times, and neither initialises CUDA. What cannot be served is
declined with one warning line, and the engine goes on as if this package were not installed.
"""

from __future__ import annotations

import logging

BACKEND_PATH = "tq_backend.vllm_adapter.backend.TurboQuantBackend"
CPU_PLATFORM_PATH = "tq_backend.vllm_adapter.platform.TurboQuantCpuPlatform"

# vLLM configures the "vllm" logger tree; lines of a logger outside it would not be seen.
logger = logging.getLogger("vllm.tq_backend")


def register() -> None:
    """`vllm.general_plugins`: puts our class behind AttentionBackendEnum.TURBOQUANT, unless a probe fails."""
    try:
        from tq_backend.vllm_adapter import patches, probes

        unmet = probes.unmet()
        patches.declined[:] = unmet
        patches.apply()  # when we decline too: `strict` turns that into an error
        if unmet:
            logger.warning(
                "tq-backend declines: %s; the flags turboquant_* keep vLLM's own meaning in this run", "; ".join(unmet)
            )
            return
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        register_backend(AttentionBackendEnum.TURBOQUANT, BACKEND_PATH)
    except Exception as error:  # an engine must start whatever is wrong with this package
        logger.warning("tq-backend declines: %s: %s", type(error).__name__, error)


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
