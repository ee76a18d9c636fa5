"""A sample of tokens with what was active at each, in random order: a text whose tokens are shuffled.

Kept are the tokens whose place in the text (window, position) has the least hashes, a bit for each neuron. So
the sample does not depend on batches, processes or their order, and its memory is bounded.
"""

from collections.abc import Iterator

import numpy as np
import torch

from relufy.measure.traces import Trace

SAMPLED_TOKENS = 4096


class TokenSample:
    """Add the traces of all layers, batch after batch; at most `size` tokens are kept."""

    def __init__(self, layers: int, size: int = SAMPLED_TOKENS, seed: int = 0) -> None:
        self._size, self._seed = size, seed
        self._bits: list[np.ndarray | None] = [None] * layers
        self._hashes: list[np.ndarray] = [np.zeros(0, dtype=np.uint64)] * layers
        self.width = 0

    def add(self, trace: Trace) -> None:
        hashes = self._hashes_of(trace)
        bits = _packed(trace.active[trace.is_token()])
        before, layer = self._bits[trace.layer], trace.layer
        if before is not None:
            hashes, bits = np.concatenate([self._hashes[layer], hashes]), np.concatenate([before, bits])
        kept = np.argsort(hashes, kind="stable")[: self._size]
        self._hashes[layer], self._bits[layer] = hashes[kept], bits[kept]
        self.width = trace.active.shape[-1]

    def layers(self) -> Iterator[np.ndarray]:
        """Yield each layer's tokens in their random order, uint8 `[tokens, width / 8]`, first bit lowest."""
        for bits in self._bits:
            assert bits is not None, "nothing was added"
            yield bits

    def _hashes_of(self, trace: Trace) -> np.ndarray:
        numbers = np.arange(trace.first, trace.first + len(trace.lengths), dtype=np.uint64)
        places = [
            (number << np.uint64(32)) + np.arange(length, dtype=np.uint64)
            for number, length in zip(numbers, trace.lengths, strict=True)
        ]
        return scrambled(np.concatenate(places), self._seed)


def scrambled(places: np.ndarray, seed: int) -> np.ndarray:
    """Return a hash of each uint64 (splitmix64, Steele, Lea and Flood 2014, figure 19)."""
    x = places + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 & (1 << 64) - 1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def _packed(active: torch.Tensor) -> np.ndarray:
    return np.packbits(active.cpu().numpy(), axis=-1, bitorder="little")
