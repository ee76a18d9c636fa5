"""The CPU engine: a thin, typed layer over the C++ module."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from relufy.engine.packed_file import read_header
from relufy.engine.spec import MAX_CONTEXT
from relufy.errors import UserError

Logits = Literal["last", "all", "none"]
MAX_THREADS = 1024
LOGITS = ("last", "all", "none")

try:
    from relufy.engine import _cpu
except ImportError as error:  # pragma: no cover
    raise UserError(
        f"the engine is not built ({error}); install relufy with pip, which compiles it"
    ) from None


class OutOfContext(UserError):
    """There is no room for the tokens: free or truncate a sequence, or open the engine with more context."""


def usable_cores() -> int:
    """Return how many cores this process may use: its affinity, capped by the cgroup's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


class CpuEngine:
    """Sequences of tokens over one packed model (design: `open, new_sequence, step, fork, truncate, free`).

    `context` is the number of positions of the KV cache, over all sequences; None means the model's own.
    `skip=False` reads every weight: the same logits, bit for bit, for comparison. Thread-safe: steps queue.
    """

    def __init__(
        self, path: Path | str, threads: int | None = None, context: int | None = None, skip: bool = True
    ):
        self.header = read_header(Path(path))
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise UserError(f"threads must be at least 1 and at most {MAX_THREADS}, found {threads}")
        if context is not None and not 1 <= context <= MAX_CONTEXT:
            raise UserError(f"context must be at least 1 position and at most {MAX_CONTEXT}, found {context}")
        try:
            self._engine = _cpu.Engine(str(path), threads or usable_cores(), context or 0, skip)
        except (ValueError, RuntimeError, MemoryError) as error:
            raise UserError(f"the engine could not open {path}: {error}") from None

    @property
    def threads(self) -> int:
        return self._engine.threads

    @property
    def context(self) -> int:
        return min(self._engine.context, self._engine.max_context)

    @property
    def vocab_size(self) -> int:
        return self._engine.vocab_size

    @property
    def isa(self) -> str:
        """The instruction set of the kernels in use: portable, avx2 or avx512 (`RELUFY_ISA` forces one)."""
        return self._engine.isa

    def new_sequence(self) -> int:
        return self._engine.new_sequence()

    def fork(self, sequence: int) -> int:
        """Return a new sequence with the same past. The KV blocks are shared until one of the two writes."""
        return self._checked(self._engine.fork, sequence)

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all positions from `length` on."""
        self._checked(self._engine.truncate, sequence, length)

    def free(self, sequence: int) -> None:
        self._checked(self._engine.free, sequence)

    def length(self, sequence: int) -> int:
        return self._checked(self._engine.length, sequence)

    def step(self, work: Sequence[tuple[int, Sequence[int]]], logits: Logits = "last") -> np.ndarray:
        """Extend sequences by tokens; return float32 logits `[rows, vocab_size]` in the order of the work.

        Rows: one per sequence ("last"), one per token ("all"), or none. Raises UserError for bad tokens and
        OutOfContext if they don't fit; then nothing has changed.
        """
        if logits not in LOGITS:
            raise UserError(f"logits must be one of {', '.join(LOGITS)}, found {logits!r}")
        items = _work_items(work)
        rows = {"last": len(items), "all": sum(len(t) for _, t in items), "none": 0}[logits]
        out = np.empty((rows, self.vocab_size), np.float32)
        self._checked(self._engine.step, items, logits, out)
        return out

    def stats(self) -> dict:
        """Return the counts since the last reset (csrc/engine.h, Stats)."""
        return self._engine.stats()

    def sparsity(self, before: dict, after: dict) -> dict[str, list[float]]:
        """Return the share skipped between two counts of `stats()`, by site, one value for each layer.

        Only sites that have a sparsifier are named. q stands for q, k, v, which share their input; gate
        likewise.
        """
        tokens = after["tokens"] - before["tokens"]
        hidden, neurons = self.header.numbers["hidden_size"], self.header.numbers["intermediate_size"]
        widths = {"q": ("attention_inputs_used", hidden), "gate": ("mlp_inputs_used", hidden)}
        widths["neuron"] = ("neurons_used", neurons)
        shares = {
            site: [1 - (a - b) / max(1, tokens * width) for a, b in zip(after[key], before[key], strict=True)]
            for site, (key, width) in widths.items()
        }
        return {site: values for site, values in shares.items() if any(values)}

    def reset_stats(self) -> None:
        self._engine.reset_stats()

    @staticmethod
    def _checked(function, *arguments):
        try:
            return function(*arguments)
        except _cpu.OutOfKv as error:
            raise OutOfContext(str(error)) from None
        except (ValueError, TypeError) as error:
            raise UserError(str(error).splitlines()[0]) from None


def _work_items(work: Sequence[tuple[int, Sequence[int]]]) -> list[tuple[int, np.ndarray]]:
    try:
        return [(sequence, _token_array(tokens)) for sequence, tokens in work]
    except UserError:
        raise
    except (TypeError, ValueError):
        raise UserError("a step takes pairs of a sequence and a flat list of its tokens") from None


def _token_array(tokens: Sequence[int]) -> np.ndarray:
    array = np.asarray(tokens)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise UserError("tokens must be a flat list of whole numbers")
    if array.size and (array.min() < 0 or array.max() >= 1 << 31):
        raise UserError(f"token {array.min() if array.min() < 0 else array.max()} is not in the vocabulary")
    return np.ascontiguousarray(array, dtype=np.int32)
