"""What the adapter needs of the engine and of this installation, asked of the objects themselves and not of versions."""

from __future__ import annotations

from collections.abc import Callable

from tq_backend._library import native, torch_ops


def _backend_seam() -> str:
    from vllm.v1.attention import backend
    from vllm.v1.attention.backends import registry

    if not hasattr(registry, "register_backend"):
        return "this vLLM has no register_backend"
    if "TURBOQUANT" not in registry.AttentionBackendEnum.__members__:
        return "this vLLM has no AttentionBackendEnum.TURBOQUANT"
    if not hasattr(backend.AttentionBackend, "customize_spec"):
        return "this vLLM plans pages without AttentionBackend.customize_spec (before 0.32)"
    return ""


def _spec_seam() -> str:
    import dataclasses

    from vllm.v1 import kv_cache_interface as interface

    fields = {field.name for field in dataclasses.fields(interface.AttentionSpec)}
    if not {"state_content_bytes", "kv_quant_mode"} <= fields:
        return "this vLLM's AttentionSpec has no state_content_bytes or kv_quant_mode"
    if not hasattr(interface.KVQuantMode.NONE, "is_turboquant"):
        return "this vLLM's KVQuantMode does not know turboquant"
    return ""


def _ops() -> str:
    try:
        torch_ops()
    except (ImportError, OSError) as error:
        return str(error)
    return ""


def _kernels() -> str:
    from vllm.platforms import current_platform

    kind = "cpu" if current_platform.is_cpu() else "hip" if current_platform.is_rocm() else "cuda"
    library = next(row for row in native().libraries() if row["kind"] == kind)
    return "" if library["usable"] else f"the {kind} kernels are not usable: {library['reason']}"


PROBES: dict[str, Callable[[], str]] = {
    "attention backend registry": _backend_seam,
    "KV cache spec": _spec_seam,
    "LibTorch ops": _ops,
    "kernel library of this platform": _kernels,
}


def results() -> dict[str, str]:
    """Each probe's name with what is wrong, empty if nothing is."""
    found = {}
    for name, probe in PROBES.items():
        try:
            found[name] = probe()
        except Exception as error:  # an engine that changed under us: say so instead of raising
            found[name] = f"{type(error).__name__}: {error}"
    return found


def unmet() -> list[str]:
    return [problem for problem in results().values() if problem]
