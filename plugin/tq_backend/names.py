"""Names that the entry points, the adapter and the commands must spell alike, and the question whether an engine asks for us.

The lowest file of the package's Python half: it imports nothing of the package and opens nothing, because an engine without a
compressed cache runs it too.
"""

from __future__ import annotations

from typing import Any

BACKEND_PATH = "tq_backend.vllm_adapter.backend.TurboQuantBackend"
CPU_PLATFORM_PATH = "tq_backend.vllm_adapter.platform.TurboQuantCpuPlatform"

# vLLM configures the "vllm" logger tree; lines of a logger outside it would not be seen.
LOGGER = "vllm.tq_backend"

# Of all cache dtypes that are ours.
PREFIX = "turboquant_"
# How a refusal ends: what the user can do.
ALTERNATIVE = "use --kv-cache-dtype auto or fp8 for it"


def is_ours(cache_dtype: Any) -> bool:
    return isinstance(cache_dtype, str) and cache_dtype.startswith(PREFIX)


def asks(vllm_config: Any) -> bool:
    """Whether an engine has one of our cache dtypes. All that runs of this package in an engine that has none, so it takes whatever
    it is given: the engine's configuration may have changed under us."""
    return is_ours(getattr(getattr(vllm_config, "cache_config", None), "cache_dtype", None))
