"""What must hold for us to serve an engine: that vLLM has what the adapter touches, and that this installation can compute."""

from __future__ import annotations

from collections.abc import Callable

from tq_backend._library import native, torch_ops
from tq_backend.vllm_adapter import interface


def _interface() -> str:
    return "; ".join(interface.unmet(interface.Without.DECLINE))


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
    "vLLM's interface": _interface,
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
