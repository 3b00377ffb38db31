"""Bidirectional spans: the images of a prompt, whose tokens see each other in both directions."""

from __future__ import annotations

import functools
import logging

import torch

from tq_backend.names import LOGGER

logger = logging.getLogger(LOGGER)


@functools.cache
def _say(longest: int) -> None:
    logger.warning("tq-backend: images of more than %d tokens, the window, are attended causally", longest)


def spans_of_batch(
    ranges: dict[int, list[tuple[int, int]]] | None, num_reqs: int, device: torch.device, longest: int = 0
) -> torch.Tensor | None:
    """int32 [num_reqs, max_spans, 2] token positions [first, end) as the kernels take them, empty ones [0, 0); None if there
    is no span.

    ranges: vLLM's `mm_req_doc_ranges`, by request of the batch, with the last position included. longest: spans of more tokens
    are left out, as vLLM leaves them out for a model that does not clamp them; 0 takes all.
    """
    rows: list[list[tuple[int, int]]] = []
    for request in range(num_reqs):
        spans = [(first, last + 1) for first, last in (ranges or {}).get(request, [])]
        kept = [span for span in spans if not longest or span[1] - span[0] <= longest]
        if len(kept) < len(spans):
            _say(longest)
        rows.append(kept)
    width = max(map(len, rows), default=0)
    if width == 0:
        return None
    padded = [row + [(0, 0)] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.int32).to(device, non_blocking=True)
