"""vLLM's CPU platform with one difference: layers with a turboquant_* cache go to our backend, all others to the stock one.

Stock CpuPlatform ignores the requested backend and runs its own kernel over the packed bytes.
"""

from __future__ import annotations

from typing import Any

from vllm.platforms.cpu import CpuPlatform

from tq_backend.names import ALTERNATIVE, BACKEND_PATH, is_ours
from tq_backend.vllm_adapter import serving


class TurboQuantCpuPlatform(CpuPlatform):
    @classmethod
    def get_attn_backend_cls(cls, *args: Any, **kwargs: Any) -> str:
        """vLLM's own arguments, whatever they are: a layer without a compressed cache must not notice us."""
        compressed = [x for x in (*args, *kwargs.values()) if is_ours(getattr(x, "kv_cache_dtype", None))]
        if not compressed:
            return super().get_attn_backend_cls(*args, **kwargs)
        asked = compressed[0]
        if asked.use_mla or asked.use_sparse:
            raise NotImplementedError(
                f"kv_cache_dtype {asked.kv_cache_dtype} does not serve MLA or sparse attention, whose cache is not keys and "
                f"values; {ALTERNATIVE}"
            )
        if reason := serving.not_ours():
            raise RuntimeError(
                f"kv_cache_dtype {asked.kv_cache_dtype} needs tq-backend on a CPU, and {reason}; run tq-check"
            )
        return BACKEND_PATH
