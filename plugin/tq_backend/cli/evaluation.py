"""Runs real engines over the same windows: one with a native cache, and one for each format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tq_backend.cli import simulated
from tq_backend.cli.engine import Engine, counters
from tq_backend.cli.heldout import CODE, windows_of
from tq_backend.cli.reads import bytes_per_token, check_all_compressed
from tq_backend.cli.rows import Row, row_of
from tq_backend.cli.scores import Score, compare, paired
from tq_backend.cli.tasks import ANSWER_TOKENS, GREEDY_TOKENS, agreeing, generated, keys_found

BF16 = "bf16"


@dataclass
class Wanted:
    """What to measure."""

    model: Path
    formats: list[str]
    texts: list[str] = field(default_factory=lambda: [CODE])
    windows: int = 8
    window: int = 4096
    skip_layers: list[int | str] | None = field(default_factory=list)  # None: those that each format has by default
    against: str | None = None  # one of the formats
    decode: bool = False
    needles: list[int] = field(default_factory=list)  # lengths
    keys: int = 8
    greedy: bool = False


class Evaluation:
    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.windows = {t: windows_of(wanted.model, t, wanted.windows, wanted.window) for t in wanted.texts}
        self.longest = max([wanted.window, *(length + ANSWER_TOKENS for length in wanted.needles)])
        self.base: dict[str, list[torch.Tensor]] = {}  # hidden states of the native cache
        self.base_greedy: dict[str, list[list[int]]] = {}
        self.rows: list[Row] = []
        self.progress = tqdm(total=self._total(), unit="token", unit_scale=True, desc="texts", mininterval=1)

    def _total(self) -> int:
        """Tokens run through the model and positions scored."""
        wanted = self.wanted
        compressed = sum(name not in simulated.SIMULATED for name in wanted.formats)
        passes = 1 + len(wanted.formats) + (simulated.FP8 in wanted.formats)
        per_pass = 2 * wanted.windows * wanted.window * len(wanted.texts)
        tasks = sum(wanted.keys * (length + ANSWER_TOKENS) for length in wanted.needles)
        tasks += wanted.greedy * wanted.windows * wanted.window * len(wanted.texts)
        decode = wanted.decode * wanted.window * 2 * len(wanted.texts)
        return passes * per_pass + (1 + compressed) * tasks + compressed * decode

    @contextmanager
    def _engine(self, name: str) -> Iterator[Engine]:
        """An engine whose every token moves the progress."""
        self.progress.set_description(f"{name}: start of an engine")
        kv_format = None if name == BF16 else name
        engine = Engine(self.wanted.model, kv_format, self.longest, skip_layers=self.wanted.skip_layers)
        tick = engine.model.register_forward_hook(self._ran)
        self.progress.set_description(name)
        try:
            yield engine
        finally:
            tick.remove()
            engine.close()

    def _ran(self, _module: Any, _args: Any, output: torch.Tensor) -> None:
        self.progress.update(len(output))

    def _scores(self, engine: Engine, text: str) -> list[Score]:
        return [
            compare(engine, base, engine.prefill(tokens), tokens[1:], self.progress.update)
            for tokens, base in zip(self.windows[text], self.base[text], strict=True)
        ]

    def _greedy(self, engine: Engine, text: str) -> list[list[int]]:
        prompts = [tokens[: self.wanted.window - GREEDY_TOKENS] for tokens in self.windows[text]]
        return generated(engine, prompts, GREEDY_TOKENS)

    def _needles(self, engine: Engine) -> dict[str, str]:
        keys = self.wanted.keys
        return {str(n): f"{keys_found(engine, self.wanted.model, n, keys)}/{keys}" for n in self.wanted.needles}

    def _row(self, text: str, cache: str, num_bytes: int, scores: list[Score], **more: Any) -> Row:
        return row_of(self.wanted.model.resolve().name, text, cache, num_bytes, self.wanted.window, scores, **more)

    def _done(self, row: Row) -> Row:
        baseline = next((r for r in self.rows if (r.cache, r.text) == (self.wanted.against, row.text)), None)
        if baseline is not None:
            row.against = paired(baseline.cache, baseline.window_kl, row.window_kl)
        self.rows.append(row)
        return row

    def run(self) -> Iterator[Row]:
        """A row as soon as it is measured: first bf16's, then those of the format to compare with."""
        with self.progress:
            yield from self._native()
            rest = [name for name in self.wanted.formats if name not in simulated.SIMULATED]
            for name in sorted(rest, key=lambda name: name != self.wanted.against):
                yield from self._compressed(name)

    def _native(self) -> Iterator[Row]:
        """bf16, and in the same engine what is simulated."""
        with self._engine(BF16) as engine:
            with simulated.noted_amax(engine) as amax:
                for text, windows in self.windows.items():
                    self.base[text] = [engine.prefill(tokens) for tokens in windows]
            needles = self._needles(engine)
            for text, windows in self.windows.items():
                scores = [
                    compare(engine, base, base, tokens[1:], self.progress.update)
                    for tokens, base in zip(windows, self.base[text], strict=True)
                ]
                row = self._row(text, BF16, bytes_per_token(engine), scores)
                row.needles = needles
                if self.wanted.greedy:
                    self.base_greedy[text] = self._greedy(engine, text)
                yield self._done(row)
            for name in simulated.SIMULATED:  # fp8 first, which others are compared with
                if name in self.wanted.formats:
                    yield from self._simulated(name, engine, amax)

    def _simulated(self, name: str, engine: Engine, amax: simulated.Amax) -> Iterator[Row]:
        self.progress.set_description(name)
        size = simulated.bytes_per_token(engine, name)
        for text in self.windows:
            found = []
            for note, change in simulated.ways(name, amax).items():
                with simulated.stored_through(engine, change):
                    scores = self._scores(engine, text)
                found.append(self._row(text, name, size, scores, note=note))
            yield self._done(min(found, key=lambda row: row.kl))

    def _compressed(self, name: str) -> Iterator[Row]:
        with self._engine(name) as engine:
            needles = self._needles(engine)
            for text, windows in self.windows.items():
                before = counters()
                scores = self._scores(engine, text)
                check_all_compressed(engine, before, counters(), [len(tokens) for tokens in windows])
                row = self._row(text, name, bytes_per_token(engine), scores, skip_layers=self.wanted.skip_layers)
                row.needles = needles
                if self.wanted.decode:
                    self._decode(engine, text, row)
                if self.wanted.greedy:
                    row.greedy = agreeing(self.base_greedy[text], self._greedy(engine, text))
                yield self._done(row)

    def _decode(self, engine: Engine, text: str, row: Row) -> None:
        tokens, base = self.windows[text][0], self.base[text][0][:-1]
        before = counters()
        hidden = engine.decode_forced(tokens)
        check_all_compressed(engine, before, counters(), [len(tokens) - 1])
        row.decode_kl = compare(engine, base, hidden, tokens[1:]).kl
        row.decode_prefill_kl = compare(engine, base, engine.prefill(tokens)[:-1], tokens[1:]).kl
