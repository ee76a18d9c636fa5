"""The CPU engine: a thin, typed layer over the C++ module."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from relufy.engine.crossover import load_crossover, rows_of
from relufy.engine.packed_file import F32, Header, read_header
from relufy.engine.reuse import Reuse
from relufy.engine.sampling import Chosen, Sampling
from relufy.engine.spec import MAX_CONTEXT
from relufy.errors import UserError

Logits = Literal["last", "all", "none"]
MAX_THREADS = 1024
MAX_TOKEN = (1 << 31) - 1
LOGITS = ("last", "all", "none")
KV_DTYPES = ("f32", "bf16", "f16")

try:
    from relufy.engine import _cpu
except ImportError as error:  # pragma: no cover
    raise UserError(
        f"the engine is not built ({error}); install relufy with pip, which compiles it"
    ) from None


GREEDY = Sampling()


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


def own_isa() -> str:
    """Return the instruction set that an engine uses here: portable, avx2, avx512 or neon."""
    try:
        return _cpu.isa()
    except ValueError as error:
        raise UserError(str(error)) from None


class CpuEngine:
    """Sequences of tokens over one packed model (design: `open, new_sequence, step, fork, truncate, free`).

    `context` is the number of positions of the KV cache, over all sequences; None means the model's own.
    `kv_dtype` is "f32", "bf16" or "f16"; None means f32 for a model in f32, else f16. `skip=False` reads
    every weight: the same logits, bit for bit, for comparison. `load=True` copies the file into memory of the
    process, in huge pages where the system has them, instead of mapping it; `mlock=True` keeps the file's
    pages in memory. `threads_of` is another engine, whose threads this one uses in turn with it. Thread-safe:
    steps queue.

    Full blocks of 32 positions stay in the KV cache after their sequences are freed, until their room is
    needed, for `reuse_prefix`; they take no room of the context.
    """

    def __init__(
        self,
        path: Path | str,
        threads: int | None = None,
        context: int | None = None,
        skip: bool = True,
        kv_dtype: str | None = None,
        load: bool = False,
        mlock: bool = False,
        threads_of: "CpuEngine | None" = None,
    ):
        self.header = read_header(Path(path))
        if threads is not None:
            check_whole("threads", threads, 1, MAX_THREADS)
        if context is not None:
            check_whole("context", context, 1, MAX_CONTEXT)
        if kv_dtype not in (None, *KV_DTYPES):
            raise UserError(f"kv_dtype must be one of {', '.join(KV_DTYPES)}, found {kv_dtype!r}")
        self.kv_dtype = kv_dtype or _default_kv_dtype(self.header)
        try:
            self._engine = _cpu.Engine(
                str(path),
                int(threads or usable_cores()),
                int(context or 0),
                skip,
                self.kv_dtype,
                load,
                mlock,
                threads_of and threads_of._engine,
            )
        except (ValueError, RuntimeError, MemoryError) as error:
            raise UserError(f"the engine could not open {path}: {error}") from None
        crossover = load_crossover(self.threads, self.isa)
        self.has_measured_crossover = crossover is not None
        for kernel, dtype, tokens, share in rows_of(crossover or {}):
            self.set_crossover(kernel, dtype, tokens, share)

    @property
    def native(self) -> _cpu.Engine:
        """The C++ engine."""
        return self._engine

    @property
    def threads(self) -> int:
        return self._engine.threads

    @property
    def context(self) -> int:
        return min(self._engine.context, self._engine.max_context)

    @property
    def free_positions(self) -> int:
        """How many positions of the context no sequence holds, in whole blocks of 32."""
        return self._engine.free_positions

    @property
    def vocab_size(self) -> int:
        return self._engine.vocab_size

    @property
    def isa(self) -> str:
        """The instruction set in use: portable, avx2, avx512 or neon (`RELUFY_ISA` forces one)."""
        return self._engine.isa

    @property
    def huge_page_share(self) -> float:
        """The share of the weights' memory that lies in huge pages."""
        return self._engine.huge_page_share()

    def new_sequence(
        self, prompt_length: int = 0, reuse: Reuse | None = None, num_open: int | None = None
    ) -> int:
        """Return an empty sequence whose first `prompt_length` tokens are the prompt.

        Masks of phase "decode" leave the prompt dense, and presence and frequency penalty don't count it.
        `reuse` lets later tokens reuse neurons, after the first `num_open`, by default the prompt. Raises
        UserError if the file can't serve that.
        """
        check_whole("prompt_length", prompt_length, 0, MAX_CONTEXT)
        num_open = prompt_length if num_open is None else num_open
        check_whole("num_open", num_open, 0, MAX_CONTEXT)
        arguments = int(prompt_length), _native_reuse(reuse), int(num_open)
        return self.checked(self._engine.new_sequence, *arguments)

    def check_reuse(self) -> None:
        """Raise UserError, with the reason, if the file's neurons can't be reused."""
        if reason := self._engine.refuses_candidates():
            raise UserError(f"the neurons of this file can't be reused: {reason}")

    def new_predicted_sequence(self, prompt_length: int = 0, num_open: int | None = None) -> int:
        """Return an empty sequence whose tokens compute only the neurons that the file's predictor names.

        The first `num_open`, by default the prompt, compute all of them. Raises UserError if the file has no
        predictor.
        """
        check_whole("prompt_length", prompt_length, 0, MAX_CONTEXT)
        num_open = prompt_length if num_open is None else num_open
        check_whole("num_open", num_open, 0, MAX_CONTEXT)
        return self.checked(self._engine.new_predicted_sequence, int(prompt_length), int(num_open))

    def check_predictor(self) -> None:
        """Raise UserError, with the reason, if the file's neurons can't be predicted."""
        if reason := self._engine.refuses_prediction():
            raise UserError(f"the neurons of this file can't be predicted: {reason}")

    def reuse_prefix(self, sequence: int, tokens: Sequence[int]) -> int:
        """Fill an empty sequence with the first of `tokens` that the KV cache holds; return how many.

        One token at least is left for the caller to step. Later logits are the same bits as without. They
        come from other sequences, freed or not, that began with the same tokens (and, where the model has
        masks of phase "decode", as much of a prompt), in whole blocks of 32.
        """
        return self.checked(self._engine.reuse_prefix, sequence, token_array(tokens))

    def fork(self, sequence: int, reuse: Reuse | None = None) -> int:
        """Return a new sequence with the same past. The KV blocks are shared until one of the two writes.

        With `reuse`, it reuses neurons by other settings from here on, as if its last token were the open
        one; a sequence that keeps track of active neurons, such as one of period 1, can be forked so. Raises
        UserError if it did not keep what the settings ask for.
        """
        return self.checked(self._engine.fork, sequence, _native_reuse(reuse))

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all positions from `length` on."""
        self.checked(self._engine.truncate, sequence, length)

    def free(self, sequence: int) -> None:
        self.checked(self._engine.free, sequence)

    def length(self, sequence: int) -> int:
        return self.checked(self._engine.length, sequence)

    def tokens(self, sequence: int) -> list[int]:
        """Return the tokens that a sequence has been extended by."""
        return self.checked(self._engine.tokens, sequence)

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
        self.checked(self._engine.step, items, logits, out)
        return out

    def decode(
        self,
        sequence: int,
        tokens: Sequence[int],
        count: int,
        stops: Sequence[int] = (),
        sampling: Sampling = GREEDY,
        logprobs: int = 0,
    ) -> list[Chosen]:
        """Extend a sequence by `tokens`, choose the next one, extend by that, and so on; return those chosen.

        Ends after `count` tokens, or after one of `stops`; the last one is not in the sequence yet. Each has
        its `logprobs` most likely tokens with it. Raises UserError for bad tokens, or logits that are no
        numbers, and OutOfContext if `count` tokens don't fit; then the sequence is as before.
        """
        check_whole("count", count, 1, MAX_TOKEN)
        check_whole("logprobs", logprobs, 0, self.vocab_size)
        arrays = token_array(tokens), int(count), token_array(stops)
        chosen = self.checked(
            self._engine.decode, sequence, *arrays, native_sampling(sampling), int(logprobs)
        )
        return [Chosen(*choice) for choice in chosen]

    def choose(
        self,
        sequence: int,
        logits: np.ndarray,
        sampling: Sampling = GREEDY,
        logprobs: int = 0,
        length: int | None = None,
    ) -> Chosen:
        """Choose the token after a sequence from the row of logits, `[vocab_size]`, that `step` gave for it.

        With `length`, after its first `length` tokens: for the rows of a step with several tokens. Raises
        UserError if a logit is no number.
        """
        check_whole("logprobs", logprobs, 0, self.vocab_size)
        arguments = _row(logits), native_sampling(sampling), int(logprobs), _length(length)
        return Chosen(*self.checked(self._engine.choose, sequence, *arguments))

    def probabilities(
        self, sequence: int, logits: np.ndarray, sampling: Sampling, length: int | None = None
    ) -> np.ndarray:
        """Return the distribution, float32 `[vocab_size]`, that `choose` draws from."""
        out = np.empty(self.vocab_size, np.float32)
        arguments = _row(logits), native_sampling(sampling), _length(length), out
        self.checked(self._engine.probabilities, sequence, *arguments)
        return out

    def stats(self) -> dict:
        """Return the counts since the last reset (csrc/engine.h, Stats)."""
        return self._engine.stats()

    def sparsity(self, before: dict, after: dict) -> dict[str, list[float]]:
        """Return the share skipped between two counts of `stats()`, by site, one value for each layer.

        Only sites with zeros are named. q stands for q, k, v where they share their mask; gate likewise.
        """
        tokens = max(1, after["tokens"] - before["tokens"])
        shares = {
            site: [1 - (a - b) / (tokens * self._width(site)) for a, b in zip(now, past, strict=True)]
            for (site, now), past in zip(after["used"].items(), before["used"].values(), strict=True)
        }
        return {site: s for site, s in shares.items() if any(s) and not self._follows(site, len(s))}

    def union_density(self, before: dict, after: dict, steps: int) -> dict[str, list[float]]:
        """Return the share that a step's tokens needed together, between two counts of `stats()`.

        As `sparsity`, of steps whose tokens go through the layers at once.
        """
        return {
            site: [
                (a - b) / (steps * self._width(site))
                for a, b in zip(after["used_together"][site], before["used_together"][site], strict=True)
            ]
            for site in self.sparsity(before, after)
        }

    def _width(self, site: str) -> int:
        numbers = self.header.numbers
        if site in ("neuron", "down"):
            return int(numbers["intermediate_size"])
        return int(numbers["num_heads"] * numbers["head_dim"] if site == "o" else numbers["hidden_size"])

    def _follows(self, site: str, num_layers: int) -> bool:
        """Tell whether a site shares another one's mask, which stands for it, wherever that has one."""
        leader = {"k": "q", "v": "q", "up": "gate"}.get(site)
        if leader is None:
            return False
        numbers = self.header.numbers
        masked = [i for i in range(num_layers) if f"layers.{i}.{site}.select" in numbers]
        return all(f"layers.{i}.{site}.shares_{leader}" in numbers for i in masked)

    def set_crossover(self, kernel: str, dtype: str, tokens: int, share: float) -> None:
        """Set from which share of its rows on a matrix is read whole, for steps of so many tokens.

        `kernel` is "dot" (rows of outputs) or "scatter" (rows of inputs or neurons), `tokens` is 1, 2, 4, 8
        or 16, each up to the next. Speed changes, never a bit. Raises UserError for anything else.
        """
        self.checked(self._engine.set_crossover, kernel, dtype, tokens, share)

    def reset_stats(self) -> None:
        self._engine.reset_stats()

    @staticmethod
    def checked(function, *arguments):
        """Call the C++ module; its errors become UserErrors."""
        try:
            return function(*arguments)
        except _cpu.OutOfKv as error:
            raise OutOfContext(str(error)) from None
        except (ValueError, TypeError) as error:
            raise UserError(str(error).splitlines()[0]) from None
        except MemoryError:
            raise UserError("there is no memory left; free sequences, or open it with less context") from None


def check_whole(name: str, value: int, least: int, most: int) -> None:
    """Raise UserError unless a value is a whole number within limits."""
    is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not (is_whole and least <= value <= most):
        limits = f"at least {least} and at most {most}"
        raise UserError(f"{name} must be a whole number, {limits}, found {value!r}")


def _row(logits: np.ndarray) -> np.ndarray:
    row = np.asarray(logits)
    if row.ndim != 1 or row.dtype.kind != "f":
        raise UserError("logits must be one row of floats, [vocab_size]")
    return np.ascontiguousarray(row, np.float32)


def _length(length: int | None) -> int | None:
    if length is not None:
        check_whole("length", length, 0, MAX_CONTEXT)
        return int(length)
    return None


def native_sampling(sampling: Sampling) -> _cpu.Sampling:
    """Return a sampling as the C++ module takes it."""
    return _cpu.Sampling(
        float(sampling.temperature),
        min(int(sampling.top_k), MAX_TOKEN),
        float(sampling.top_p),
        float(sampling.min_p),
        float(sampling.repetition_penalty),
        float(sampling.presence_penalty),
        float(sampling.frequency_penalty),
        list(sampling.logit_bias.items()),
        int(sampling.seed),
    )


def _native_reuse(reuse: Reuse | None) -> _cpu.Reuse | None:
    return None if reuse is None else _cpu.Reuse(**reuse.document())


def _default_kv_dtype(header: Header) -> str:
    """Return "f32" for a model stored in f32, so that it stays exact, else "f16"."""
    embedding = header.tensors.get("embedding")
    return "f32" if embedding is None or embedding.dtype == F32 else "f16"


def _work_items(work: Sequence[tuple[int, Sequence[int]]]) -> list[tuple[int, np.ndarray]]:
    try:
        return [(sequence, token_array(tokens)) for sequence, tokens in work]
    except UserError:
        raise
    except (TypeError, ValueError):
        raise UserError("a step takes pairs of a sequence and a flat list of its tokens") from None


def token_array(tokens: Sequence[int]) -> np.ndarray:
    """Return tokens as the C++ module takes them. Raises UserError if they are none."""
    array = np.asarray(tokens)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise UserError("tokens must be a flat list of whole numbers")
    if array.size and (array.min() < 0 or array.max() > MAX_TOKEN):
        raise UserError(f"token {array.min() if array.min() < 0 else array.max()} is not in the vocabulary")
    return np.ascontiguousarray(array, dtype=np.int32)
