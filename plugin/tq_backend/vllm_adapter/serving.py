"""Whether our class serves the turboquant_* caches of this process.

Asked by an engine that has such a cache, and by no other: the answer needs the probes, which open shared libraries, and it puts
our class in the place of vLLM's. vLLM asks the class behind TURBOQUANT about every layer on a GPU, so a class that was put there
at registration would run in engines that have nothing to do with it.
"""

from __future__ import annotations

import functools
import logging

from tq_backend.names import BACKEND_PATH, LOGGER

logger = logging.getLogger(LOGGER)


@functools.cache
def declined() -> str:
    """What the probes say in this process, "" if nothing is wrong. Said in the log once."""
    from tq_backend.vllm_adapter import probes

    reason = "; ".join(probes.unmet())
    if reason:
        logger.warning("tq-backend declines: %s; the flags turboquant_* keep vLLM's own meaning in this run", reason)
    return reason


def not_ours() -> str:
    """Why something else than our class serves turboquant_* here, "" if ours does: the first call puts it there."""
    reason = declined()
    if reason:
        return reason
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    path = AttentionBackendEnum.TURBOQUANT.get_path()
    if path == AttentionBackendEnum.TURBOQUANT.value:
        register_backend(AttentionBackendEnum.TURBOQUANT, BACKEND_PATH)
    elif path != BACKEND_PATH:  # another plugin's
        return f"AttentionBackendEnum.TURBOQUANT stands for {path}"
    return ""
