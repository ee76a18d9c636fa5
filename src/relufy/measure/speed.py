"""How fast the engine decodes one packed file beside another, in turns, so that noise hits both alike."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from relufy.engine.cpu import CpuEngine

SPARE_POSITIONS = 64
"""The KV cache is made of blocks."""


@dataclass(frozen=True)
class Speed:
    """Medians over turns. `ratio` is that of a turn's two speeds, sparse over dense."""

    tokens_per_second: float
    dense_tokens_per_second: float
    ratio: float
    tokens: int
    turns: int
    threads: int


def speed_beside(
    dense: Path, sparse: Path, prompt: Sequence[int], tokens: int, turns: int, threads: int | None = None
) -> Speed:
    """Let both files write `tokens` tokens after a prompt, greedily, in turns; the first is the warm-up."""
    context = len(prompt) + tokens + SPARE_POSITIONS
    engines = [CpuEngine(path, threads, context) for path in (dense, sparse)]
    rows = []
    for turn in range(turns + 1):
        order = (0, 1) if turn % 2 else (1, 0)
        speeds = {index: _decode(engines[index], prompt, tokens) for index in order}
        rows.append((speeds[0], speeds[1]))
    timed = rows[1:]
    return Speed(
        tokens_per_second=median(sparse for _, sparse in timed),
        dense_tokens_per_second=median(dense for dense, _ in timed),
        ratio=median(sparse / dense for dense, sparse in timed),
        tokens=tokens,
        turns=turns,
        threads=engines[0].threads,
    )


def _decode(engine: CpuEngine, prompt: Sequence[int], tokens: int) -> float:
    """Return tokens per second after the prompt has been read."""
    sequence = engine.new_sequence(len(prompt))
    engine.step([(sequence, list(prompt[:-1]))], "none")
    start = time.perf_counter()
    engine.decode(sequence, [prompt[-1]], tokens)
    seconds = time.perf_counter() - start
    engine.free(sequence)
    return tokens / seconds
