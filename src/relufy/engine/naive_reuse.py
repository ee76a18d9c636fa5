"""The specification of neuron reuse: which neurons a token may use, given what earlier ones had active."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from relufy.engine.reuse import Reuse

SAMPLED = 64
"""Adaptive: one neuron in so many is sampled at each position."""


@dataclass
class NaiveReuse:
    """Settings, the tokens that are always open, which later ones are (`opens`), and what layers found.

    `active` and `sets` hold bools `[tokens, neurons]` by layer: neurons that were active, and the sets of
    frozen tokens, without samples.
    """

    reuse: Reuse
    num_open: int
    opens: list[bool]
    active: dict[int, np.ndarray] = field(default_factory=dict)
    sets: dict[int, np.ndarray] = field(default_factory=dict)

    def limit(self, layer: int, neurons: np.ndarray, mask: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Return outputs of neurons `[tokens, neurons]`, 0 where a token may not use them.

        `mask` returns what of them the next matrix reads; what is not zero then is active.
        """
        neurons = neurons.copy()
        active, sets = np.zeros(neurons.shape, bool), np.zeros(neurons.shape, bool)
        sums = np.zeros(neurons.shape[1])
        for token in range(len(neurons)):
            if not self.opens[token]:
                sets[token] = self._set(layer, token, active, sums)
                neurons[token, ~(sets[token] | self._sample(layer, token, neurons.shape[1]))] = 0
            read = mask(neurons)[token]
            active[token] = read != 0
            if token < self.num_open and read.any():
                sums += read**2 / (read**2).sum()
        self.active[layer], self.sets[layer] = active, sets
        return neurons

    def opens_next(self, token: int) -> bool:
        """Adaptive: tell whether a token opens, from what those before it found."""
        last = max(i for i in range(token) if self.opens[i])
        if token - last >= self.reuse.period:
            return True
        sampled = missed = 0
        for layer, active in self.active.items():
            for i in range(last + 1, token):
                found = active[i] & self._sample(layer, i, active.shape[1])
                sampled += found.sum()
                missed += (found & ~self.sets[layer][i]).sum()
        return bool(missed > self.reuse.most_missed * sampled)

    def _set(self, layer: int, token: int, active: np.ndarray, sums: np.ndarray) -> np.ndarray:
        reuse, neurons = self.reuse, active.shape[1]
        if reuse.policy == "prompt":
            end, found = self.num_open, np.zeros(neurons, bool)
            found[np.argsort(-sums, kind="stable")[: int(reuse.share * neurons + 0.5)]] = True
        elif reuse.policy == "blocks":
            end = token - (token - self.num_open) % reuse.period
            first = end - reuse.period if reuse.resets else 0
            found = active[[i for i in range(first, end) if self.opens[i]]].any(0)
        else:
            end = 1 + max(i for i in range(token) if self.opens[i])
            found = active[max(0, end - reuse.window) : end].any(0)
        return _random_set(layer, end, int(found.sum()), neurons) if reuse.is_control else np.asarray(found)

    def _sample(self, layer: int, token: int, neurons: int) -> np.ndarray:
        """Return which neurons a frozen token computes beside its set."""
        sampled = np.zeros(neurons, bool)
        if self.reuse.policy == "adaptive":
            for word in range(-(-neurons // SAMPLED)):
                neuron = word * SAMPLED + (mix(layer << 32 | word) + token) % (1 << 64) % SAMPLED
                if neuron < neurons:
                    sampled[neuron] = True
        return sampled


def opens_by_period(reuse: Reuse, num_open: int, tokens: int) -> list[bool]:
    """Return which tokens are open; of an adaptive policy only those that need no decision."""

    def is_open(token: int) -> bool:
        since = token - num_open
        if since <= 0:
            return True
        if reuse.policy == "blocks":
            return since // reuse.period % 2 == 0
        return reuse.policy != "adaptive" and since % reuse.period == 0

    return [is_open(token) for token in range(tokens)]


def mix(x: int) -> int:
    """Return the hash of csrc/mix.h, of 64 bits."""
    mask = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def _random_set(layer: int, end: int, count: int, neurons: int) -> np.ndarray:
    key, found = mix(end << 32 | layer), np.zeros(neurons, bool)
    found[sorted(range(neurons), key=lambda i: mix((key + i) % (1 << 64)))[:count]] = True
    return found
