"""The class behind AttentionBackendEnum.TURBOQUANT: what is served, and how many bytes a page has."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionType, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from tq_backend.vllm_adapter import formats
from tq_backend.vllm_adapter.tolerance import pass_over

if TYPE_CHECKING:
    from vllm.platforms.interface import DeviceCapability

BLOCK_SIZE_MULTIPLE = 16
MIN_COMPUTE_CAPABILITY = (7, 5)


class TurboQuantBackend(AttentionBackend):
    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = formats.CACHE_DTYPES

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """vLLM derives a class for layers that attend in chunks; which of them we serve is decided in patches.py."""
        from tq_backend.vllm_adapter.patches import apply_to_chunks

        super().__init_subclass__(**kwargs)
        apply_to_chunks(TurboQuantBackend)

    @staticmethod
    def get_name() -> str:
        return "TURBOQUANT"  # vLLM looks the enum member up by this name

    @staticmethod
    def get_impl_cls() -> type:
        from tq_backend.vllm_adapter.impl import TurboQuantImpl

        return TurboQuantImpl

    @staticmethod
    def get_builder_cls() -> type:
        from tq_backend.vllm_adapter.metadata import TurboQuantMetadataBuilder

        return TurboQuantMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Sets the page size. Called any number of times on the same spec: must not change it twice."""
        if spec.state_content_bytes is not None or not spec.kv_quant_mode.is_turboquant:
            return spec
        dtype = spec.kv_quant_mode.name.lower()  # member names mirror the dtype names
        return replace(spec, state_content_bytes=formats.slot_bytes(dtype, spec.head_size, spec.head_size_v))

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # A page is one run of bytes in either, and its inside is ours. One layout has to serve all layers: the stock CPU
        # backend reads LBHNC only, vLLM's GPU backends prefer LBNHC.
        return (KVCacheLayout.LBHNC, KVCacheLayout.LBNHC)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[MultipleOf]:
        return [MultipleOf(BLOCK_SIZE_MULTIPLE)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return formats.serves_head_dim(head_size)

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return tuple(capability) >= MIN_COMPUTE_CAPABILITY

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def validate_configuration(cls, **asked: Any) -> list[str]:
        """vLLM's own answer. A question of a newer engine, which this one's base class does not know, is passed over."""
        known = inspect.signature(super().validate_configuration).parameters
        pass_over("validate_configuration", set(asked) - set(known))
        return super().validate_configuration(**{name: x for name, x in asked.items() if name in known})

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return True
