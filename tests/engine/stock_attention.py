"""The prefill route's stock kernel and merge on a CPU: attention from its definition, and vLLM's own torch merge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tq_backend.vllm_adapter import metadata, prefill
from tq_backend.vllm_adapter.prefill_plan import Limits


def attention(
    query, key, value, query_start_loc, key_start_loc, max_query_len, max_key_len, causal, window, scale, out
):
    """prefill.StockAttention in float64, so that what a test sees is the route's own error."""
    group = query.shape[1] // key.shape[1]
    lse = torch.full((query.shape[1], len(query)), -torch.inf)
    queries, keys = query_start_loc.tolist(), key_start_loc.tolist()
    assert queries[-1] == len(query) == len(out) and keys[-1] == len(key) == len(value)
    for s in range(len(queries) - 1):
        rows, columns = slice(queries[s], queries[s + 1]), slice(keys[s], keys[s + 1])
        q = query[rows].double()
        k, v = (x[columns].double().repeat_interleave(group, 1) for x in (key, value))
        assert len(q) <= max_query_len and len(k) <= max_key_len
        score = torch.einsum("qhd,khd->hqk", q, k) * scale
        distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        if causal:
            score.masked_fill_(distance < 0, -torch.inf)
        if window:
            score.masked_fill_(distance >= window, -torch.inf)
        lse[:, rows] = score.logsumexp(-1).float()
        out[rows] = torch.einsum("hqk,khd->qhd", score.softmax(-1), v).to(out.dtype)
    return out, lse


def merge(out, lse_out, first, first_lse, second, second_lse):
    """prefill.Merge. Threads of the GPU's merge read a row's log-sum-exps while others write the merged one."""
    assert lse_out.data_ptr() not in (first_lse.data_ptr(), second_lse.data_ptr())
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    merge_attn_states(out, first, first_lse, second, second_lse, lse_out)


@contextmanager
def prefill_route(limits: Limits) -> Iterator[list[int]]:
    """Layers that are made meanwhile have the route, on a CPU. Gives the query rows of each of its runs."""
    kept = prefill.unserved, prefill.flash_attention_3, prefill.vllm_merge, metadata.limits_of, prefill.PrefillRoute.run
    runs: list[int] = []

    def run(self, plan, *args):
        runs.append(sum(part.queries[1] - part.queries[0] for part in plan.slices))
        kept[-1](self, plan, *args)

    prefill.unserved = lambda *_args: None
    prefill.flash_attention_3, prefill.vllm_merge = (lambda: attention), (lambda: merge)
    metadata.limits_of = lambda *_args: limits
    prefill.PrefillRoute.run = run
    try:
        yield runs
    finally:
        (
            prefill.unserved,
            prefill.flash_attention_3,
            prefill.vllm_merge,
            metadata.limits_of,
            prefill.PrefillRoute.run,
        ) = kept
