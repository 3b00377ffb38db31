"""Keywords of an engine that is newer than this package.

An unexpected `tq_slot_size` once took a whole engine down. What we do not know we pass over, and say so once: forward() meets the
same keyword in every layer of every step.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable

from tq_backend.names import LOGGER

logger = logging.getLogger(LOGGER)


@functools.cache
def _say(where: str, names: tuple[str, ...]) -> None:
    logger.warning("TURBOQUANT ignores what this vLLM gives to %s and it does not know: %s", where, ", ".join(names))


def pass_over(where: str, unknown: Iterable[str]) -> None:
    """One warning line per place and set of names; nothing if there are none."""
    if names := tuple(sorted(unknown)):
        _say(where, names)
