"""TurboQuant KV caches for inference engines: the Python side of libtq_backend.so.

Importing this package needs neither torch nor vLLM; the modules that do import them on use.
"""

from importlib import metadata
from pathlib import Path

try:
    __version__ = metadata.version("tq-backend")
except metadata.PackageNotFoundError:  # a source tree on PYTHONPATH
    __version__ = "0+source"


def get_include() -> str:
    """The folder of tq_backend.h, for a compiler's -I."""
    return _folder("include")


def get_cmake_dir() -> str:
    """The folder of the CMake package: find_package(tq_backend) with tq_backend_DIR set to it."""
    return _folder("cmake")


def _folder(name: str) -> str:
    folder = Path(__file__).resolve().parent / name
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no {folder}: this is a source tree; install the package with pip first")
    return str(folder)
