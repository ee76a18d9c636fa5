"""Choosing the next token. Random numbers are counter-based: drawn from (seed, position), not a state."""

from dataclasses import dataclass

import numpy as np

from relufy.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How to choose: `temperature` 0 takes the most likely token; `top_k` 0 and `top_p` 1 leave all in."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or 1e-6 <= self.temperature < float("inf")):
            raise UserError(f"temperature must be 0, or 1e-6 and more, found {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (all) or more, found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, found {self.top_p}")
        if not 0 <= self.seed < 1 << 64:
            raise UserError(f"seed must be at least 0 and below 2**64, found {self.seed}")


def sample(logits: np.ndarray, position: int, sampling: Sampling) -> int:
    """Return the token after `position` tokens, from logits `[vocab]`. Same arguments, same token."""
    if sampling.temperature == 0:
        return int(np.argmax(logits))
    ids, weights = _weights(logits, sampling)
    drawn = np.random.Generator(np.random.Philox(key=sampling.seed, counter=position)).random()
    cumulative = np.cumsum(weights)
    return int(ids[min(np.searchsorted(cumulative, drawn * cumulative[-1], side="right"), len(ids) - 1)])


def _weights(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens left in and their unnormalised probabilities, float64."""
    if sampling.top_k == 0 and sampling.top_p == 1:
        return np.arange(len(logits)), _exponentials(logits, sampling.temperature)
    order = np.argsort(-logits, kind="stable")[: sampling.top_k or None]
    weights = _exponentials(logits[order], sampling.temperature)
    if sampling.top_p < 1:
        before = np.cumsum(weights) - weights
        kept = max(1, int(np.count_nonzero(before < sampling.top_p * weights.sum())))
        order, weights = order[:kept], weights[:kept]
    return order, weights


def _exponentials(logits: np.ndarray, temperature: float) -> np.ndarray:
    scaled = logits.astype(np.float64) / temperature
    return np.exp(scaled - scaled.max())
