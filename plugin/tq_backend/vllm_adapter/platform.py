"""vLLM's CPU platform with one difference: layers with a turboquant_* cache go to our backend, all others to the stock one.

Stock CpuPlatform ignores the requested backend and runs its own kernel over the packed bytes.
"""

from __future__ import annotations

import logging
from typing import Any

from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tq_backend.register import BACKEND_PATH

logger = logging.getLogger("vllm.tq_backend")


class TurboQuantCpuPlatform(CpuPlatform):
    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        dtype = attn_selector_config.kv_cache_dtype
        if dtype is None or not dtype.startswith("turboquant_"):
            return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        if attn_selector_config.use_mla or attn_selector_config.use_sparse:
            raise NotImplementedError(
                f"kv_cache_dtype {dtype} does not serve MLA or sparse attention, whose cache is not keys and values; use "
                "--kv-cache-dtype auto or fp8 for this model"
            )
        if AttentionBackendEnum.TURBOQUANT.get_path() != BACKEND_PATH:
            raise RuntimeError(
                f"kv_cache_dtype {dtype} needs tq-backend on a CPU, and tq-backend has declined (see its warning above); "
                "run tq-check"
            )
        return BACKEND_PATH
