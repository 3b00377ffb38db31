"""Where the package's shared libraries are, and how they are opened: once per process, on first use."""

from __future__ import annotations

import functools
import struct
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PACKAGE_DIR = Path(__file__).resolve().parent
TORCH_LIBRARY = PACKAGE_DIR / "libtq_torch.so"


def is_whole(library: Path) -> bool:
    """Whether an ELF file reaches to the end of its section table, which a linker writes last. (ELF-64: e_shoff is at byte 40,
    e_shentsize and e_shnum at 58.)"""
    with library.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return False
    (offset,) = struct.unpack_from("<Q", header, 40)
    entry_bytes, entries = struct.unpack_from("<HH", header, 58)
    return offset + entry_bytes * entries <= library.stat().st_size


@functools.cache
def check_libraries() -> None:
    """Raises ImportError for a library that is cut short: the dynamic linker maps what is not there, and the process dies by SIGBUS.
    libtq_backend.so checks the kernel libraries itself."""
    for library in sorted(PACKAGE_DIR.glob("*.so*")):
        if not library.name.startswith("libtq_kernels_") and not is_whole(library):
            raise ImportError(f"{library} is cut short; reinstall it with `pip install --force-reinstall tq-backend`")


@functools.cache
def native() -> ModuleType:
    """The pybind11 module: formats, planner, reference codec, checks. Raises ImportError with what to do."""
    check_libraries()
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
    check_libraries()
    torch.ops.load_library(str(TORCH_LIBRARY))
    return torch.ops.tq_backend


def device_index(device: torch.device) -> int:
    """As the operators count devices: a GPU's index, or -1 for the CPU."""
    import torch

    if device.type == "cpu":
        return -1
    return torch.cuda.current_device() if device.index is None else device.index
