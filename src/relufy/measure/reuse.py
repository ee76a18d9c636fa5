"""What neuron reuse costs and buys: perplexity on a text, bytes and speed, for each setting.

Texts are forced on the model: windows whose first `warm_up` tokens are read in full, and whose other tokens
go through the engine under a reuse setting. (They may share a step: the engine gives the bits of one at a
time.) What the windows' later tokens cost is compared with the exact mode's on the same tokens.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from relufy.document import heading
from relufy.engine.cache import packed_model
from relufy.engine.cpu import CpuEngine
from relufy.engine.engine import Engine
from relufy.engine.generation_stats import combined
from relufy.engine.pack import check_choice, purpose_of
from relufy.engine.reuse import Reuse, ReuseStats, reuse_stats
from relufy.errors import UserError
from relufy.text import read_text, token_windows

SPARE_POSITIONS = 64
DEFINITIONS = {
    "perplexity": "exp of the mean nats of the tokens after each window's warm-up, teacher-forced",
    "perplexity_change_percent": "of exp of the mean difference in nats to the exact mode on the same tokens",
    "standard_error_percent": "of that change, over windows",
    "candidate_share": "share of all neurons that a frozen token may use; mean over tokens and layers",
    "fired_share": "share of all neurons that a frozen token then had active",
    "bytes_per_token": "weights with scales and lists, keys and values, of the tokens after the warm-up",
    "tokens_per_second": "decoding greedily after the first window's warm-up; median over turns",
    "speedup_vs_exact": "median over turns of the ratio to the exact mode's speed in the same turn",
    "speedup_vs_dense": "the same, to the own dense pack's speed",
    "random sets": "the control: sets as large, drawn at random",
}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ReuseOptions:
    """What to measure: each policy at each period, and random sets of the window's sizes as a control.

    Windows of `length` tokens begin with `warm_up` tokens that are open. `tokens` are written in each of
    `turns` turns for the speed; with no turns, speed is not measured.
    """

    gammas: tuple[int, ...] = (1, 2, 4, 8, 16)
    policies: tuple[str, ...] = ("window", "adaptive", "blocks", "prompt")
    window: int = Reuse.window
    share: float = Reuse.share
    most_missed: float = Reuse.most_missed
    length: int = 256
    warm_up: int = 128
    max_windows: int = 20
    dtype: str = "f32"
    threads: int | None = None
    tokens: int = 32
    turns: int = 3
    has_control: bool = True

    def __post_init__(self) -> None:
        check_choice(self.dtype, "reuse")
        if not 0 < self.warm_up < self.length - 1:
            raise UserError(f"a warm-up of {self.warm_up} leaves nothing of windows of {self.length} tokens")
        for name in ("max_windows", "tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, found {getattr(self, name)}")
        _ = list(self.settings())

    def settings(self) -> Iterator[Reuse]:
        """Yield each setting; a policy's periods follow one another. Raises UserError for wrong ones."""
        for policy in self.policies:
            for gamma in self.gammas:
                reuse = Reuse(
                    gamma,
                    policy,  # type: ignore[arg-type]
                    window=self.window,
                    share=self.share,
                    most_missed=self.most_missed,
                )
                yield reuse
        if self.has_control and "window" in self.policies:
            yield from (Reuse(gamma, window=self.window, is_control=True) for gamma in self.gammas)


@dataclass(frozen=True)
class Forced:
    """What a text cost: nats by window, bytes of a token, and what reuse did."""

    nats: np.ndarray
    bytes_per_token: float
    reuse: ReuseStats


def measure_reuse(
    model: str | Path,
    text: Sequence[Path | str],
    options: ReuseOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure every setting on a text and return a document of plain data.

    `model` is a checkpoint or hub id whose neurons have zeros. Raises UserError if they can't be reused, or
    the text fills no window.
    """
    options, report = options or ReuseOptions(), progress or (lambda task, done, total: None)
    words = read_text(text)
    path = packed_model(model, options.dtype, for_=purpose_of(model, True))
    engine = Engine(path, options.threads, options.length + SPARE_POSITIONS, reuse=Reuse())
    windows = _windows(engine, words, options)
    settings = list(options.settings())
    exact = force(engine, windows, options.warm_up, None)
    forced = []
    for done, reuse in enumerate(settings):
        report("reading the text", done, len(settings))
        forced.append(force(engine, windows, options.warm_up, reuse))
    speeds = _speeds(path, _dense(model, options), windows[0], settings, options, report)
    rows = [_row(*found, exact) for found in zip(settings, forced, speeds, strict=True)]
    return {
        **heading("relufy.measure.reuse"),
        "model": str(model),
        "options": {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(options).items()},
        "tokens": int(windows[:, options.warm_up + 1 :].size),
        "windows": len(windows),
        "exact": {"perplexity": _perplexity(exact), "bytes_per_token": exact.bytes_per_token},
        "settings": rows,
        "definitions": DEFINITIONS,
    }


def force(engine: CpuEngine, windows: np.ndarray, warm_up: int, reuse: Reuse | None) -> Forced:
    """Read windows, `[windows, length]`, token by token after their warm-up, and say what that cost."""
    nats, before = [], engine.stats()
    prompt = before
    for window in windows:
        sequence = engine.new_sequence(warm_up, reuse)
        start = engine.stats()
        engine.step([(sequence, window[:warm_up])], "none")
        prompt = combined(prompt, combined(engine.stats(), start, -1), 1)
        rows = [engine.step([(sequence, window[i : i + 1])])[0] for i in range(warm_up, len(window) - 1)]
        engine.free(sequence)
        nats.append(float(np.mean(_nats(np.array(rows), window[warm_up + 1 :]))))
    counts = combined(engine.stats(), prompt, -1)
    read = (counts["weight_bytes"] + counts["kv_bytes"]) / counts["tokens"]
    return Forced(np.array(nats), read, reuse_stats(counts, int(engine.header.numbers["intermediate_size"])))


def _windows(engine: Engine, words: str, options: ReuseOptions) -> np.ndarray:
    start = engine.tokenizer.encode("")
    if options.length > engine.context:
        raise UserError(f"windows of {options.length} tokens are longer than the context of {engine.context}")

    def encode(part: str) -> list[int]:
        return engine.tokenizer.encode(part)[len(start) :]

    some = words[: options.length * options.max_windows * 16]
    return token_windows(some, encode, options.length, start[0] if start else None)[: options.max_windows]


def _dense(model: str | Path, options: ReuseOptions) -> Path | None:
    return packed_model(model, options.dtype, for_="dense") if options.turns else None


def _nats(logits: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), chosen]


def _perplexity(forced: Forced) -> float:
    return math.exp(float(forced.nats.mean()))


def _speeds(
    path: Path,
    dense: Path | None,
    window: np.ndarray,
    settings: Sequence[Reuse],
    options: ReuseOptions,
    report: Progress,
) -> list[dict[str, float | None]]:
    """Let every setting, the exact mode and the dense pack write in turns; the first turn is the warm-up."""
    names = ("tokens_per_second", "speedup_vs_exact", "speedup_vs_dense")
    if dense is None:
        return [dict.fromkeys(names) for _ in settings]
    prompt, count = window[: options.warm_up].tolist(), options.tokens
    context = len(prompt) + count + SPARE_POSITIONS
    engine, other = (CpuEngine(file, options.threads, context) for file in (path, dense))
    contenders: list[tuple[CpuEngine, Reuse | None]] = [
        (other, None),
        (engine, None),
        *((engine, reuse) for reuse in settings),
    ]
    turns = []
    for turn in range(options.turns + 1):
        report("taking turns", turn, options.turns + 1)
        order = range(len(contenders))[:: -1 if turn % 2 else 1]
        speeds = {place: _tokens_per_second(*contenders[place], prompt, count) for place in order}
        turns.append([speeds[place] for place in range(len(contenders))])
    timed = np.array(turns[1:])
    return [dict(zip(names, _medians(timed, place), strict=True)) for place in range(2, len(contenders))]


def _medians(timed: np.ndarray, place: int) -> tuple[float, float, float]:
    own = timed[:, place]
    return float(median(own)), float(median(own / timed[:, 1])), float(median(own / timed[:, 0]))


def _tokens_per_second(engine: CpuEngine, reuse: Reuse | None, prompt: list[int], count: int) -> float:
    sequence = engine.new_sequence(len(prompt), reuse)
    engine.step([(sequence, prompt)], "none")
    start = time.perf_counter()
    engine.decode(sequence, prompt[-1:], count)
    seconds = time.perf_counter() - start
    engine.free(sequence)
    return count / seconds


def _row(reuse: Reuse, forced: Forced, speed: dict[str, Any], exact: Forced) -> dict[str, Any]:
    difference = forced.nats - exact.nats
    change = float(difference.mean())
    error = float(difference.std(ddof=1) / math.sqrt(len(difference))) if len(difference) > 1 else None
    return {
        "label": reuse.label(),
        "reuse": reuse.document(),
        "perplexity": _perplexity(forced),
        "perplexity_change_percent": 100 * math.expm1(change),
        "standard_error_percent": None if error is None else 100 * math.exp(change) * error,
        **asdict(forced.reuse),
        "bytes_per_token": forced.bytes_per_token,
        "bytes_vs_exact": forced.bytes_per_token / exact.bytes_per_token,
        **speed,
    }
