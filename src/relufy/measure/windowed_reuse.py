"""Neuron reuse: how many of a token's active neurons were active in the last w tokens (ReLU2 Wins, arXiv
2402.03804, section 5; LLM in a Flash, arXiv 2312.11514, calls it windowing).

    reuse@w = mean over tokens t of |A_t n (A_{t-1} u ... u A_{t-w})| / |A_t|

What is not reused has to be loaded. The mean is over the tokens that have the longest of the windows behind
them, so all w are of the same tokens; a token without any active neuron has no share and is left out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from relufy.errors import UserError
from relufy.measure.token_sample import TokenSample
from relufy.measure.traces import Trace

WINDOWS = (1, 2, 4, 8, 16, 32, 64)
_UNIT = 1 << 32
"""Shares are summed as whole numbers of 1 / _UNIT, so that the sum does not depend on the order."""
DEFINITIONS = {
    "reuse": "share of a token's active neurons that were active at one of the last w tokens, a mean over "
    "tokens that have max(w) tokens before them in their window and at least one active neuron",
    "reuse_shuffled": "the same with the text's tokens shuffled",
}


@dataclass(frozen=True)
class Reuse:
    """Reuse of each layer at each window, in tokens: `measured[layer][window]`; NaN without any token."""

    windows: tuple[int, ...]
    measured: tuple[tuple[float, ...], ...]
    shuffled: tuple[tuple[float, ...], ...]
    tokens: tuple[int, ...]
    """By layer: those that count."""

    def mean(self, curve: str = "measured") -> tuple[float, ...]:
        """Return the mean over the layers that have a token with active neurons."""
        counted = [row for row in getattr(self, curve) if not np.isnan(row).any()]
        return tuple(np.mean(counted, axis=0).tolist()) if counted else (math.nan,) * len(self.windows)

    def to_json(self) -> dict[str, Any]:
        """Return plain lists: by curve the `mean` over layers, and `layers`, a value for each window."""
        found = {c: {"mean": self.mean(c), "layers": getattr(self, c)} for c in ("measured", "shuffled")}
        return {"windows": self.windows, "tokens": self.tokens} | found


class ReuseCounts:
    """Add the traces of all layers, batch after batch."""

    def __init__(self, layers: int, sample: TokenSample, windows: Sequence[int] = WINDOWS) -> None:
        if not windows or min(windows) < 1:
            raise UserError(f"windows of reuse are of 1 token or more, found {list(windows)}")
        self._windows, self._sample = tuple(sorted(set(windows))), sample
        self._sums = torch.zeros(layers, len(self._windows), dtype=torch.int64)
        self._tokens = torch.zeros(layers, dtype=torch.int64)

    def add(self, trace: Trace) -> None:
        for active in trace.active:  # one window at a time: [time, width] of 8 bytes each
            sums, tokens = reuse_sums(active, self._windows)
            self._sums[trace.layer] += sums
            self._tokens[trace.layer] += tokens

    def result(self) -> Reuse:
        shuffled = [_of_packed(bits, self._sample.width, self._windows) for bits in self._sample.layers()]
        counts = self._tokens.tolist()
        measured = tuple(_shares(sums, n) for sums, n in zip(self._sums, counts, strict=True))
        return Reuse(self._windows, measured, tuple(shuffled), tuple(counts))


def reuse_sums(active: torch.Tensor, windows: Sequence[int]) -> tuple[torch.Tensor, int]:
    """Return the sum of shares over the tokens that count, in 1 / 2**32, int64 `[windows]`, and their number.

    `active` is bool `[time, width]`; padding is active nowhere.
    """
    time = len(active)
    times = torch.arange(1, time + 1, device=active.device, dtype=torch.int32)[:, None]
    last = torch.where(active, times, 0).cummax(0).values
    before = torch.cat([torch.zeros_like(last[:1]), last[:-1]])
    distance = torch.where(before > 0, times - before, time + 1)
    number = active.sum(-1)
    counts = (number > 0) & (times[:, 0] > max(windows))
    sums = torch.zeros(len(windows), dtype=torch.int64)
    for index, window in enumerate(windows):
        again = (active & (distance <= window)).sum(-1)[counts]
        sums[index] = (again * _UNIT // number[counts]).sum().cpu()
    return sums, int(counts.sum())


def _of_packed(bits: np.ndarray, width: int, windows: Sequence[int]) -> tuple[float, ...]:
    """Return the shares of tokens in the order in which they are kept, 8 neurons a byte."""
    run = 8 * max(windows)
    sums, tokens = torch.zeros(len(windows), dtype=torch.int64), 0
    for start in range(0, len(bits), run):
        active = np.unpackbits(bits[start : start + run], axis=-1, count=width, bitorder="little")
        found, count = reuse_sums(torch.from_numpy(active).bool(), windows)
        sums, tokens = sums + found, tokens + count
    return _shares(sums, tokens)


def _shares(sums: torch.Tensor, tokens: int) -> tuple[float, ...]:
    return tuple((sums.double() / _UNIT / tokens).tolist()) if tokens else (float("nan"),) * len(sums)
