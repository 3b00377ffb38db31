"""`--additional-config '{"turboquant": {...}}'`: what has no flag of its own."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

KEYS = ("format", "skip_layers", "current", "strict", "sliding_window")
CURRENT = ("raw", "compressed")
MAX_WINDOW = 2**31 - 1  # the kernels count in 32 bits: a longer window would wrap around to another one
# What acts where EngineArgs makes a configuration, and the key beside "turboquant" that says it did.
AT_CREATION, CREATED = ("format", "skip_layers", "strict", "sliding_window"), "tq_backend_created"


@dataclass(frozen=True)
class Options:
    # Of the pages, where it is not the one that the cache dtype names.
    format: str | None = None
    # Layers that keep the native cache; None leaves vLLM's choice (the first and last two of a dense model) with the formats that
    # cache dtypes name, and with the others those whose key bias they do not hold.
    skip_layers: tuple[str, ...] | None = None
    # How a prefill reads its own chunk: "raw", as it came, or "compressed", from pages. None: raw on GPUs, compressed on CPUs.
    current: str | None = None
    # An error instead of a warning line where TurboQuant was asked for and something else would run.
    strict: bool = False
    # Tokens that a layer without a window of its own attends to; None: all. A config class may refuse or ignore such a window.
    sliding_window: int | None = None


def read_options(additional_config: Any) -> Options:
    """Raises ValueError with the nearest name for an unknown key, or a sentence for a wrong value."""
    given = additional_config.get("turboquant", {}) if isinstance(additional_config, dict) else {}
    if not isinstance(given, dict):
        raise ValueError(f"additional_config['turboquant'] is {given!r}; it must be a dictionary with the keys {KEYS}")
    for key in given:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1, cutoff=0.0)
            raise ValueError(f"additional_config['turboquant'] has the unknown key {key!r}; did you mean {near[0]!r}?")
    name = given.get("format")
    if name is not None and name not in (known := format_names()):
        near = difflib.get_close_matches(str(name), known, n=1)
        raise ValueError(
            f"additional_config['turboquant']['format'] is {name!r}; it must be one of {', '.join(known)}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    current = given.get("current")
    if current is not None and current not in CURRENT:
        raise ValueError(f"additional_config['turboquant']['current'] is {current!r}; it must be one of {CURRENT}")
    strict = given.get("strict", False)
    if not isinstance(strict, bool):
        raise ValueError(f"additional_config['turboquant']['strict'] is {strict!r}; it must be true or false")
    window = given.get("sliding_window")
    if window is not None:
        check_window(window, "additional_config['turboquant']['sliding_window']")
    skip = given.get("skip_layers")
    if skip is None:
        return Options(name, current=current, strict=strict, sliding_window=window)
    if not isinstance(skip, list) or not all(isinstance(x, int | str) and not isinstance(x, bool) for x in skip):
        raise ValueError(
            f"additional_config['turboquant']['skip_layers'] is {skip!r}; it must be a list of layer numbers or layer kinds"
        )
    return Options(name, tuple(str(x) for x in skip), current, strict, window)


def format_names() -> list[str]:
    from tq_backend._library import native

    return [row["name"] for row in native().formats() if not row["test_only"]]


def check_window(window: Any, argument: str) -> None:
    """Raises ValueError with a sentence unless it is a number of tokens that the kernels can count."""
    if not isinstance(window, int) or isinstance(window, bool) or not 1 <= window <= MAX_WINDOW:
        raise ValueError(f"{argument} is {window!r}; it must be a number of tokens from 1 to {MAX_WINDOW}")


def check_in_force(additional_config: Any) -> None:
    """Raises ValueError for options that came too late: in a VllmConfig that EngineArgs did not make."""
    options = read_options(additional_config)
    late = [key for key in AT_CREATION if getattr(options, key) not in (None, False)]
    if late and not additional_config.get(CREATED):
        raise ValueError(
            f"additional_config['turboquant'] sets {', '.join(late)} in a VllmConfig that was not made by "
            "EngineArgs.create_engine_config, where they act; make it there, or set cache_config.kv_cache_dtype_skip_layers and "
            "cache_config.sliding_window yourself and leave them away"
        )
