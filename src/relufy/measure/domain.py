"""Whether two texts are of one domain, by how often each token occurs in them.

Methods that are calibrated on the training part of the data set that they are tested on look better than on
any other text. The Jensen-Shannon divergence of token frequencies tells: from the one text to the other it is
compared with the one between the two halves of the text that is tested on. Measured on novels, encyclopedia,
children's stories, plays and web pages: 0.9 to 1.25 times as much within a domain, 1.5 times or more across.
"""

from dataclasses import dataclass

import numpy as np

SAME_DOMAIN_RATIO = 1.35
LEAST_TOKENS = 4096
"""In each half: with fewer, chance outweighs the domain."""


@dataclass(frozen=True)
class Domains:
    """Divergences in bits, at equal numbers of tokens: between the texts, and within the second."""

    between: float
    within: float
    tokens: int

    @property
    def ratio(self) -> float:
        return self.between / self.within if self.within else float("inf" if self.between else "nan")

    @property
    def is_same(self) -> bool:
        return self.between <= SAME_DOMAIN_RATIO * self.within


def compare_domains(train: np.ndarray, test: np.ndarray) -> Domains | None:
    """Return the divergences of two texts, int64 `[windows, length]`; None for too little text to tell."""
    middle = len(test) // 2
    halves = test[:middle].ravel(), test[middle:].ravel()
    count = min(train.size, *(half.size for half in halves))
    if count < LEAST_TOKENS:
        return None
    calibration, first, second = (_spread(ids, count) for ids in (train.ravel(), *halves))
    between = (divergence(calibration, first) + divergence(calibration, second)) / 2
    return Domains(between, divergence(first, second), count)


def divergence(first: np.ndarray, second: np.ndarray) -> float:
    """Return the Jensen-Shannon divergence of the frequencies of tokens, in bits: 0 to 1."""
    size = int(max(first.max(), second.max())) + 1
    p, q = (np.bincount(ids, minlength=size) / len(ids) for ids in (first, second))
    middle = (p + q) / 2
    return sum(float((x[x > 0] * np.log2(x[x > 0] / middle[x > 0])).sum()) for x in (p, q)) / 2


def _spread(ids: np.ndarray, count: int) -> np.ndarray:
    """Return so many of the tokens, from all of the text."""
    return ids[np.linspace(0, len(ids) - 1, count).astype(int)]
