"""Aggregated sparsity: the share of neurons that none of t consecutive tokens needs (ReLU Strikes Back, arXiv
2310.04564, section 5.1).

    s_agg(t) = 1 - |A_1 u ... u A_t| / f,   A_j: the neurons that are active at token j

Independent tokens of sparsity s would have s^t, the paper's baseline. Neurons that fire unequally often beat
that even if tokens had nothing to do with each other, so two fairer ones stand beside it: the mean over
neurons of (1 - p_i)^t, p_i being how often neuron i is active, and what is measured when the text's tokens
are shuffled. Only what exceeds these is similarity of neighbouring tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from relufy.measure.token_sample import TokenSample
from relufy.measure.traces import Trace

DEFINITIONS = {
    "aggregated": "share of neurons that are active at none of the first t tokens of a window, a mean over "
    "windows (ReLU Strikes Back, section 5.1)",
    "aggregated_shuffled": "the same over t tokens drawn from all of the text",
    "aggregated_independent": "mean over neurons of (1 - p_i)^t, p_i the share of tokens that neuron i is "
    "active at",
    "aggregated_uniform": "s^t, s the layer's mean sparsity: the paper's baseline",
}


@dataclass(frozen=True)
class Aggregated:
    """Aggregated sparsity of each layer after 1, 2, 3... tokens: `measured[layer][t - 1]`."""

    windows: tuple[int, ...]
    """How many windows have t tokens."""
    measured: tuple[tuple[float, ...], ...]
    shuffled: tuple[tuple[float, ...], ...]
    """May be shorter: as long as the sampled tokens permit."""
    independent: tuple[tuple[float, ...], ...]
    uniform: tuple[tuple[float, ...], ...]
    standard_error: tuple[float, ...]
    """Of the mean over layers, over windows; NaN for a single one."""

    def mean(self, curve: str = "measured") -> tuple[float, ...]:
        """Return the mean over layers of one of the curves."""
        return tuple(np.mean(getattr(self, curve), axis=0).tolist())

    def at(self, tokens: int, curve: str = "measured") -> float:
        """Return the mean over layers after so many tokens."""
        return self.mean(curve)[tokens - 1]

    def to_json(self) -> dict[str, Any]:
        """Return plain lists: `mean` over layers, and `layers`, by curve; place t - 1 is after t tokens."""
        curves = ("measured", "shuffled", "independent", "uniform")
        found = {name: {"mean": self.mean(name), "layers": getattr(self, name)} for name in curves}
        length = len(self.windows)
        counts = {"tokens": list(range(1, length + 1)), "windows": self.windows}
        return counts | found | {"standard_error": self.standard_error}


def independent_sparsity(rates: np.ndarray, tokens: int) -> np.ndarray:
    """Return mean_i (1 - p_i)^t for t = 1 ... `tokens`, from the rates p_i `[..., neurons]`."""
    times = np.arange(1, tokens + 1)
    return np.stack([((1 - rates) ** t).mean(-1) for t in times], axis=-1)


class AggregatedCounts:
    """Add the traces of all layers, batch after batch."""

    def __init__(self, layers: int, sample: TokenSample) -> None:
        self._sample = sample
        self._united: list[Any] = [0] * layers
        """Sums over windows of the united neurons after each number of tokens, int64 `[time]`."""
        self._fired: list[Any] = [0] * layers
        self._windows: Any = 0
        self._squares: Any = 0
        """Of a window's united neurons in all layers together."""
        self._tokens, self._width, self._pending = 0, 0, torch.zeros(0)

    def add(self, trace: Trace) -> None:
        """Add one layer's trace; those of a batch come in the order of the layers."""
        united, layer = _united(trace.active), trace.layer
        is_token = trace.is_token()
        united *= is_token
        self._united[layer] = _longer_sum(self._united[layer], united.sum(0))
        self._fired[layer] = self._fired[layer] + trace.active.sum((0, 1))
        self._pending = united if layer == 0 else self._pending + united.to(self._pending.device)
        if layer == 0:
            self._width = trace.active.shape[-1]
            self._tokens += sum(trace.lengths)
            self._windows = _longer_sum(self._windows, is_token.sum(0))
        if layer == len(self._united) - 1:
            self._squares = _longer_sum(self._squares, self._pending.square().sum(0))

    def rates(self) -> np.ndarray:
        """Return how often each neuron is active, `[layers, neurons]`."""
        return np.stack([fired.cpu().numpy() for fired in self._fired]) / self._tokens

    def result(self) -> Aggregated:
        windows = np.trim_zeros(self._windows.cpu().numpy())
        united = np.stack([layer.cpu().numpy() for layer in self._united])[:, : len(windows)]
        rates = self.rates()
        sparsity = 1 - rates.mean(-1, keepdims=True)
        return Aggregated(
            windows=tuple(windows.tolist()),
            measured=_rows(1 - united / (windows * self._width)),
            shuffled=_rows(self._shuffled(len(windows))),
            independent=_rows(independent_sparsity(rates, len(windows))),
            uniform=_rows(sparsity ** np.arange(1, len(windows) + 1)),
            standard_error=tuple(self._errors(united.sum(0), windows)),
        )

    def _shuffled(self, longest: int) -> np.ndarray:
        """Return the mean over runs of tokens of the sample, which is in random order."""
        found = []
        for bits in self._sample.layers():
            run = min(longest, len(bits))
            runs = bits[: len(bits) // run * run].reshape(-1, run, bits.shape[-1])
            united = np.bitwise_count(np.bitwise_or.accumulate(runs, axis=1)).sum((0, 2), dtype=np.int64)
            found.append(1 - united / (len(runs) * self._width))
        return np.stack(found)

    def _errors(self, sums: np.ndarray, windows: np.ndarray) -> list[float]:
        squares = self._squares.cpu().numpy()[: len(windows)]
        scale = self._width * len(self._united)
        with np.errstate(divide="ignore", invalid="ignore"):
            variance = (squares - sums.astype(float) ** 2 / windows) / (windows - 1)
            return (np.sqrt(np.maximum(variance, 0) / windows) / scale).tolist()


def _united(active: torch.Tensor) -> torch.Tensor:
    """Return how many neurons were active up to each time, int64 `[windows, time]`."""
    windows, time, _ = active.shape
    first = active.to(torch.uint8).argmax(1).masked_fill(~active.any(1), time)
    counts = torch.zeros(windows, time + 1, dtype=torch.int64, device=active.device)
    counts.scatter_add_(1, first, torch.ones_like(first))
    return counts[:, :time].cumsum(1)


def _longer_sum(total: Any, values: torch.Tensor) -> torch.Tensor:
    """Return the sum of two rows, the shorter one going on with zeros."""
    if isinstance(total, int):
        return values
    length = max(len(total), len(values))
    total, values = (torch.nn.functional.pad(row, (0, length - len(row))) for row in (total, values))
    return total + values.to(total.device)


def _rows(table: np.ndarray | Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in np.asarray(table).tolist())
