"""Those who take turns in a benchmark, each made in a process of its own (worker.py).

A turn adds tokens to sequences, and then forgets them, so that all turns are at the same context. Every
contender has `read(prompts)`, the three kinds of turn `decode`, `prefill` and `batch`, and `facts()`, in
plain data. Tokens that are not chosen by the model are given, the same to all.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from relufy.bench.llama_cpp import LlamaCpp
from relufy.bench.probe import read_bandwidth
from relufy.engine.cpu import CpuEngine
from relufy.engine.generation_stats import combined
from relufy.engine.prediction import prediction_stats
from relufy.engine.reuse import Reuse, reuse_stats

SPARE_POSITIONS = 64
"""Positions of each sequence beyond the longest turn: the KV cache is made of blocks."""

Turn = dict[str, Any]


def engine_facts(engine: CpuEngine) -> dict[str, Any]:
    """Return what a benchmark's document says of an engine."""
    return {
        "isa": engine.isa,
        "threads": engine.threads,
        "peak_resident_bytes": peak_resident_bytes(),
        "huge_page_share": engine.huge_page_share,
        "crossover": "measured" if engine.has_measured_crossover else "built-in",
    }


class EngineContender:
    """Our engine on one packed file."""

    def __init__(
        self,
        path: str,
        threads: int,
        positions: int,
        kv_dtype: str,
        load: bool = False,
        sequences: int = 1,
        reuse: dict[str, Any] | None = None,
        predictor: bool = False,
    ):
        self._predictor = predictor
        self._reuse = None if reuse is None else Reuse(**reuse)
        context = sequences * (positions + SPARE_POSITIONS)
        self._engine = CpuEngine(path, threads, context, kv_dtype=kv_dtype, load=load)
        self._sequences = [self._engine.new_sequence() for _ in range(sequences)]

    def read(self, prompts: list[list[int]]) -> None:
        """Give each of the first sequences its prompt."""
        for place, prompt in enumerate(prompts):
            if self._reuse or self._predictor:
                self._engine.free(self._sequences[place])
            if self._predictor:
                self._sequences[place] = self._engine.new_predicted_sequence(len(prompt))
            if self._reuse:
                self._sequences[place] = self._engine.new_sequence(len(prompt), self._reuse)
            self._engine.step([(self._sequences[place], prompt)], "none")

    def decode(self, token: int, count: int) -> Turn:
        """Write `count` tokens, the likeliest, one at a time."""
        sequence = self._sequences[0]
        return self._timed(1, lambda: self._engine.decode(sequence, [token], count))

    def prefill(self, tokens: list[int]) -> Turn:
        """Read a prompt up to the logits of its last token."""
        return self._timed(1, lambda: self._engine.step([(self._sequences[0], tokens)]))

    def batch(self, steps: list[list[int]]) -> Turn:
        """Make steps of one token for each of as many sequences as a step has tokens."""

        def run() -> None:
            for step in steps:
                work = [(self._sequences[i], (token,)) for i, token in enumerate(step)]
                self._engine.step(work)

        return self._timed(len(steps[0]), run, len(steps))

    def logits(self, tokens: list[int], others: list[int], is_one_step: bool) -> list[list[float]]:
        """Add tokens to the first sequence, one by one, or all and others after them; return their logits."""
        steps = [[*tokens, *others]] if is_one_step else [[token] for token in tokens]
        found = [self._engine.step([(self._sequences[0], step)], "all") for step in steps]
        return np.concatenate(found)[: len(tokens)].tolist()

    def facts(self) -> dict[str, Any]:
        return engine_facts(self._engine)

    def _timed(self, num_sequences: int, run: Callable[[], Any], steps: int = 0) -> Turn:
        """Return what a run took and read; then forget what it added to the first sequences.

        With a number of steps, also what the tokens of each needed together.
        """
        sequences = self._sequences[:num_sequences]
        lengths = [self._engine.length(sequence) for sequence in sequences]
        before = self._engine.stats()
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        after = self._engine.stats()
        for sequence, length in zip(sequences, lengths, strict=True):
            self._engine.truncate(sequence, length)
        read = {key: after[key] - before[key] for key in ("tokens", "weight_bytes", "kv_bytes")}
        sparsity = self._engine.sparsity(before, after)
        turn = {"seconds": seconds, **read, "density": {s: [1 - v for v in sparsity[s]] for s in sparsity}}
        if self._reuse:
            width = int(self._engine.header.numbers["intermediate_size"])
            turn["reuse"] = asdict(reuse_stats(combined(after, before, -1), width))
        if self._predictor:
            counts = combined(after, before, -1)
            turn["predictor"] = asdict(prediction_stats(counts, self._engine.header))
        if steps:
            turn |= {"steps": steps, "union_density": self._engine.union_density(before, after, steps)}
        return turn


class LlamaCppContender:
    """llama.cpp on one GGUF."""

    def __init__(self, path: str, threads: int, positions: int, sequences: int = 1):
        self._llama = LlamaCpp(path, threads, positions, sequences)

    def read(self, prompts: list[list[int]]) -> None:
        for sequence, prompt in enumerate(prompts):
            self._llama.extend(prompt, sequence)

    def decode(self, token: int, count: int) -> Turn:
        return self._timed(1, count, lambda: self._llama.decode(token, count))

    def prefill(self, tokens: list[int]) -> Turn:
        """llama-bench's `pp`: an empty cache, and logits of the last token alone."""
        self._llama.clear()
        return self._timed(1, len(tokens), lambda: self._llama.extend(tokens, wants_last=True))

    def batch(self, steps: list[list[int]]) -> Turn:
        """llama-batched-bench's `TG`: logits of every sequence, given tokens."""

        def run() -> None:
            for step in steps:
                self._llama.step(step)

        return self._timed(len(steps[0]), len(steps) * len(steps[0]), run) | {"steps": len(steps)}

    def facts(self) -> dict[str, Any]:
        return self._llama.facts() | {"peak_resident_bytes": peak_resident_bytes()}

    def _timed(self, num_sequences: int, num_tokens: int, run: Callable[[], Any]) -> Turn:
        lengths = self._llama.lengths[:num_sequences]
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        for sequence, length in enumerate(lengths):
            self._llama.truncate(length, sequence)
        return {"seconds": seconds, "tokens": num_tokens}


class ProbeContender:
    """The memory itself: how fast all threads together can read, doing nothing else."""

    def __init__(self, threads: int, num_bytes: int, seconds: float):
        self._arguments = threads, num_bytes, seconds

    def read(self, prompts: list[list[int]]) -> None: ...

    def measure(self, **arguments: Any) -> Turn:
        return {"seconds": self._arguments[-1], "gb_per_second": read_bandwidth(*self._arguments)}

    decode = prefill = batch = write = measure

    def facts(self) -> dict[str, Any]:
        return {}


def peak_resident_bytes() -> int | None:
    """Return the most memory that this process ever held, or None where the system does not say.

    Not getrusage's ru_maxrss: that one inherits the peak of the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), None)
