"""Co-activation: whether neurons have partners that they fire with (ReLU2 Wins, arXiv 2402.03804, 5).

With M the activity of T tokens, `[T, f]`, C = M^T M / T and cond_ij = C_ij / C_ii, the share of i's tokens
that j is active at too, a neuron's gap is

    gap_i = max over j != i of cond_ij - mean over j != i of cond_ij

A wide gap favours storing partners side by side. But a neuron that is nearly always active is everyone's
partner (LLM in a Flash, arXiv 2312.11514, found bundling useless for that), and gives every neuron a gap: the
gap if neurons were independent, max p_j - mean p_j, stands beside it. Counted on a sample of neurons.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from relufy.measure.traces import Trace

SAMPLED_NEURONS = 512
DEFINITIONS = {
    "coactivation_gap": "mean over sampled neurons i of max_j cond_ij - mean_j cond_ij, cond_ij the share of "
    "i's active tokens at which j is active (ReLU2 Wins, section 5)",
    "coactivation_gap_independent": "the same if neurons fired independently, as often as they do",
}


@dataclass(frozen=True)
class CoActivation:
    """The gaps of each layer, over the sampled neurons that were active at all."""

    neurons: int
    """Sampled in each layer."""
    silent: tuple[int, ...]
    """Of these, by layer: active at no token."""
    gap: tuple[float, ...]
    independent: tuple[float, ...]
    tokens: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class CoActivationCounts:
    """Add the traces of all layers, batch after batch; memory is `neurons`^2 for each layer."""

    def __init__(self, layers: int, neurons: int = SAMPLED_NEURONS, seed: int = 0) -> None:
        self._most, self._seed = neurons, seed
        self._chosen: dict[int, torch.Tensor] = {}
        self._together: list[Any] = [0] * layers
        self._tokens = 0

    def add(self, trace: Trace) -> None:
        layer, width = trace.layer, trace.active.shape[-1]
        if layer not in self._chosen:
            generator = np.random.default_rng((self._seed, layer))
            drawn = np.sort(generator.choice(width, min(width, self._most), replace=False))
            self._chosen[layer] = torch.from_numpy(drawn).to(trace.active.device)
        for active in trace.active:  # a window at a time: products of ones in float32 are exact below 2^24
            rows = active[:, self._chosen[layer]].float()
            self._together[layer] = self._together[layer] + (rows.T @ rows).long()
        self._tokens += sum(trace.lengths) if layer == 0 else 0

    def result(self) -> CoActivation:
        found = [_gaps(counts.cpu().numpy(), self._tokens) for counts in self._together]
        silent, gap, independent = zip(*found, strict=True)
        return CoActivation(len(self._together[0]), silent, gap, independent, self._tokens)


def _gaps(together: np.ndarray, tokens: int) -> tuple[int, float, float]:
    """Return how many neurons are silent, and the mean gap of the others, as it is and if independent."""
    fired = together.diagonal()
    lives = np.flatnonzero(fired)
    if len(together) < 2 or not len(lives):
        return len(together) - len(lives), 0.0, 0.0
    conditional = together[lives] / fired[lives, None]
    rates = np.broadcast_to(fired / tokens, conditional.shape)
    return len(together) - len(lives), _mean_gap(conditional, lives), _mean_gap(rates, lives)


def _mean_gap(table: np.ndarray, own: np.ndarray) -> float:
    """Return the mean over rows of the greatest less the mean entry, each without its own column."""
    others = np.array(table, dtype=np.float64)
    others[np.arange(len(own)), own] = -1.0
    greatest = others.max(1)
    mean = (others.sum(1) + 1.0) / (others.shape[1] - 1)
    return float((greatest - mean).mean())
