"""A vLLM engine inside this process, with hooks where vLLM's own outputs are too narrow.

Full-vocabulary `prompt_logprobs` are dictionaries of Python objects, one per token and position; a forward hook gives the
same numbers as one tensor.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tq_backend.names import is_ours

# Needed before vLLM is imported: one process (hooks), no network, a cache of our size.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
KV_CACHE_BYTES = 1 << 30  # VLLM_CPU_KVCACHE_SPACE


def counters(device_index: int = -1) -> dict[str, int]:
    """What this process's kernels of a device, the CPU or a GPU, have done so far."""
    from tq_backend._library import torch_ops

    names = ("store_calls", "stored_tokens", "attend_calls", "query_tokens", "compressed_kv_reads")
    return dict(zip(names, torch_ops().counters(device_index), strict=True))


def cache_dtype(kv_format: str) -> str:
    """vLLM's name beside which a format is chosen: a preset's own, or any of them."""
    return kv_format if is_ours(kv_format) else "turboquant_4bit_nc"


def format_option(kv_format: str) -> dict[str, str]:
    return {} if is_ours(kv_format) else {"format": kv_format}


def own_context(model: Path) -> int | None:
    """Tokens that a model's position embeddings are made for, if its configuration says so."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return config.get("max_position_embeddings", config.get("text_config", {}).get("max_position_embeddings"))


class Engine:
    """kv_format: a page format, with every attended token compressed in every layer but skip_layers (None: its default), or None for
    vLLM's stock backend and native cache."""

    def __init__(
        self,
        model: Path,
        kv_format: str | None,
        max_tokens: int,
        dtype: str = "bfloat16",
        skip_layers: Sequence[int | str] | None = (),
        **options: Any,
    ) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm import LLM

        if kv_format is not None:
            # Figures of a format are those of what its pages hold, on a GPU too.
            own: dict[str, Any] = {"current": "compressed"}
            if skip_layers is not None:
                own["skip_layers"] = list(skip_layers)
            options = {"additional_config": {"turboquant": own | format_option(kv_format)}} | options
            options |= {"attention_backend": "TURBOQUANT", "kv_cache_dtype": cache_dtype(kv_format)}
        # A prompt may fill the model's context; the token sampled after it is never run through the model. Not for shorter ones:
        # tables of learned positions and a choice of rotary factors depend on the number.
        context = own_context(model)
        longer = {"max_position_embeddings": max_tokens + 1} if context is not None and context <= max_tokens else {}
        overrides = longer | options.pop("hf_overrides", {})
        self.llm = LLM(
            model=str(model),
            dtype=dtype,
            enforce_eager=True,
            max_model_len=max_tokens + 1,
            hf_overrides=overrides,
            **({"max_num_seqs": 8, "max_num_batched_tokens": max_tokens + 1, "enable_prefix_caching": False} | options),
        )
        self.model: torch.nn.Module = self.llm.apply_model(lambda model: model)[0]
        self.num_layers: int = self.llm.llm_engine.model_config.hf_text_config.num_hidden_layers

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.model
        gc.collect()
        cleanup_dist_env_and_memory()

    @contextmanager
    def _captured_hidden_states(self) -> Iterator[list[torch.Tensor]]:
        rows: list[torch.Tensor] = []
        handle = self.model.register_forward_hook(lambda _module, _args, output: rows.append(output.detach().clone()))
        try:
            yield rows
        finally:
            handle.remove()

    def prefill(self, tokens: list[int]) -> torch.Tensor:
        """Hidden states [len(tokens), hidden] after the last layer, from one prefill."""
        from vllm import SamplingParams

        with self._captured_hidden_states() as rows:
            params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
            self.llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
        return torch.cat(rows)[: len(tokens)]

    def decode_forced(self, tokens: list[int]) -> torch.Tensor:
        """Hidden states [len(tokens) - 1, hidden]: one token prefilled, the others decoded one by one."""
        from vllm import SamplingParams

        upcoming = iter(tokens[1:])
        own = self.model.compute_logits

        def forced(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            logits = torch.full_like(own(hidden, *args, **kwargs), -1e4)
            logits[-1, next(upcoming)] = 0.0
            return logits

        self.model.compute_logits = forced
        try:
            with self._captured_hidden_states() as rows:
                params = SamplingParams(temperature=0, max_tokens=len(tokens) - 1, ignore_eos=True, detokenize=False)
                self.llm.generate([{"prompt_token_ids": tokens[:1]}], params, use_tqdm=False)
        finally:
            self.model.compute_logits = own
        return torch.cat([row[:1] for row in rows])

    def log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, vocabulary] float32."""
        return self.model.compute_logits(hidden).float().log_softmax(-1)
