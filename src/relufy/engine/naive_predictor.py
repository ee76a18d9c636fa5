"""The specification of the mode "predicted": the neurons that a token computes, by scores of low rank."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Product = Callable[[str, np.ndarray], np.ndarray]


@dataclass
class NaivePrediction:
    """Tokens from `num_open` on are predicted. Layers leave their `candidates`, bools `[tokens, neurons]`."""

    num_open: int
    candidates: dict[int, np.ndarray] = field(default_factory=dict)
    active: dict[int, np.ndarray] = field(default_factory=dict)
    """What of the candidates was active: bools `[tokens, neurons]`, False for open tokens."""

    def limit(
        self, layer: int, neurons: np.ndarray, scores: np.ndarray, thresholds: np.ndarray
    ) -> np.ndarray:
        """Return outputs of neurons `[tokens, neurons]`, 0 where a predicted token has no candidate."""
        is_open = (np.arange(len(neurons)) < self.num_open)[:, None]
        candidates = ~(scores < thresholds)
        limited = np.where(candidates | is_open, neurons, 0)
        self.candidates[layer], self.active[layer] = candidates & ~is_open, (limited != 0) & ~is_open
        return limited

    def margins(self, scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
        """Return how near each token's closest score is to its threshold, relative to the scores."""
        distance = np.abs(scores - thresholds).min(-1) / np.maximum(np.abs(scores).max(-1), 1e-30)
        return np.where(np.arange(len(scores)) < self.num_open, np.inf, distance)
