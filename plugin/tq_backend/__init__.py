"""TurboQuant KV caches for inference engines: the Python side of libtq_backend.so.

Importing this package needs neither torch nor vLLM; the modules that do import them on use.
"""

from importlib import metadata

try:
    __version__ = metadata.version("tq-backend")
except metadata.PackageNotFoundError:  # a source tree on PYTHONPATH
    __version__ = "0+source"
