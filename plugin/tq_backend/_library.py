"""Where the package's shared libraries are, and how they are opened: once per process, on first use."""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PACKAGE_DIR = Path(__file__).resolve().parent
TORCH_LIBRARY = PACKAGE_DIR / "libtq_torch.so"


@functools.cache
def native() -> ModuleType:
    """The pybind11 module: formats, planner, reference codec, checks. Raises ImportError with what to do."""
    try:
        from tq_backend import _native
    except ImportError as error:
        raise ImportError(
            f"tq_backend was installed without its native module ({error}); reinstall it with `pip install tq-backend`"
        ) from error
    return _native


@functools.cache
def torch_ops():
    """torch.ops.tq_backend. Raises ImportError if the package was built without LibTorch headers."""
    import torch

    if not TORCH_LIBRARY.exists():
        raise ImportError(
            f"there is no {TORCH_LIBRARY.name} in {PACKAGE_DIR}: tq_backend was built where torch >= 2.10 was not "
            "installed; install torch first and then reinstall tq-backend"
        )
    torch.ops.load_library(str(TORCH_LIBRARY))
    return torch.ops.tq_backend


def device_index(device: torch.device) -> int:
    """As the operators count devices: a GPU's index, or -1 for the CPU."""
    import torch

    if device.type == "cpu":
        return -1
    return torch.cuda.current_device() if device.index is None else device.index
