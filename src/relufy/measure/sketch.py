"""Distributions of activations in bounded memory.

Values are counted by the leading 16 bits of their float32: sign, exponent and 7 bits of mantissa, in the
order of the numbers. A bin is less than 1 % wide (2**-7 of its lower edge), at any scale, with nothing to
choose beforehand. Counts are whole numbers, so sketches of parts of a text add up to the sketch of all of it.
"""

import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

_DROPPED_BITS = 16
_BINS = 1 << 15
_FINITE = 0x7F80
"""Bins of a sign that hold finite numbers."""
_GRID = 2048
RELATIVE_ERROR = 2.0**-7
"""How far a value of a sketch may be from the true one, relative to it."""


class Sketch:
    """Counts of values. `share_below`, `curves` and `quantile` are of magnitudes, the rest of the values."""

    def __init__(self) -> None:
        self._totals = torch.zeros(2 * _BINS, dtype=torch.int64)
        """On the device of the values that were added last."""

    def __getstate__(self) -> dict[str, torch.Tensor]:
        return {"_totals": self._totals.cpu()}

    @property
    def _counts(self) -> torch.Tensor:
        """Of values with sign + and sign -, by magnitude, `[2, bins]`, on the CPU."""
        return self._totals.cpu().view(2, _BINS)

    @property
    def count(self) -> int:
        """How many values were added."""
        return int(self._counts.sum())

    def add(self, values: torch.Tensor) -> None:
        """Count every value of a floating-point tensor. They must be finite."""
        bits = values.detach().float().contiguous().view(torch.int32).flatten()
        keys = (bits >> _DROPPED_BITS) & (2 * _BINS - 1)
        self._totals = self._totals.to(keys.device) + _count(keys)

    def merge(self, other: "Sketch") -> None:
        self._totals = self._totals + other._totals.to(self._totals.device)

    def share_below(self, threshold: float) -> float:
        """Return the share of magnitudes below a threshold; within a bin they count as evenly spread."""
        bits = torch.tensor(threshold, dtype=torch.float32).view(torch.int32).item()
        key = min(int(bits) >> _DROPPED_BITS, _BINS - 1)
        below, inside = self._magnitudes[:key].sum().item(), self._magnitudes[key].item()
        lower, upper = _edges(key)
        return (below + inside * (threshold - lower) / (upper - lower)) / max(self.count, 1)

    def curves(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return ascending thresholds, and for each the share of magnitudes below it and the sum of their
        squares over the count of all values. Between two of them both grow evenly."""
        counts = self._magnitudes.numpy().astype(np.float64)
        used = int(counts.nonzero()[0].max(initial=0)) + 1
        edges = (np.arange(used + 1, dtype=np.int32) << _DROPPED_BITS).view(np.float32).astype(np.float64)
        squares = counts[:used] * ((edges[1:] + edges[:-1]) / 2) ** 2
        below = (np.concatenate([[0.0], part.cumsum()]) for part in (counts[:used], squares))
        shares, sums = (part / max(self.count, 1) for part in below)
        return edges, shares, sums

    def quantile(self, share: float) -> float:
        """Return the threshold that this share of magnitudes is below; 0 for a share that is 0 already."""
        wanted = share * self.count
        if wanted <= 0:
            return 0.0
        counts = self._magnitudes.numpy()
        cumulative = counts.cumsum()
        key = min(int((cumulative < wanted).sum()), int(counts.nonzero()[0].max()))
        if key == 0:
            return 0.0
        lower, upper = _edges(key)
        before, inside = int(cumulative[key] - counts[key]), int(counts[key])
        return lower + (upper - lower) * (wanted - before) / inside

    def shares(self) -> np.ndarray:
        """Return the share of values at or below each of `cuts()`."""
        positive, negative = self._counts[:, :_FINITE].numpy()
        zeros = negative[:1] + positive[:1]
        ordered = np.concatenate([negative[:0:-1], zeros, positive[1:]])
        return ordered.cumsum() / max(self.count, 1)

    def share_at_most(self, value: float) -> float:
        """Return the share of values that are at most this one: exact at `cuts()`, as even between them."""
        return float(np.interp(value, cuts(), self.shares()))

    def value_at(self, share: float) -> float:
        """Return the least of `cuts()` that at least this share of the values, below 1, is at most."""
        return common_value_at([self], share)

    def median(self) -> float:
        """Return the value that half of the values are below."""
        edges, below = self._distribution()
        return _unless_zero(float(_values_at([0.5], edges, below)[0]))

    def mode(self) -> float:
        """Return the peak of a Gaussian kernel density estimate, sought in the middle 98 % of the values.

        Its width is `0.9 min(deviation, interquartile range / 1.34) n**-0.2` (Silverman 1986, eq. 3.31).
        """
        edges, below = self._distribution()
        low, first, third, high = _values_at([0.01, 0.25, 0.75, 0.99], edges, below)
        step = (high - low) / _GRID
        middles = low + step * (np.arange(_GRID) + 0.5)
        deviation = _deviation(middles, _shares(low + step * np.arange(_GRID + 1), edges, below))
        width = 0.9 * min(deviation, (third - first) / 1.34) * self.count**-0.2 / step
        radius = math.ceil(4 * width)
        shares = _shares(low + step * np.arange(-radius, _GRID + radius + 1), edges, below)
        kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / max(width, 1e-9)) ** 2)
        peak = float(middles[np.convolve(shares, kernel, "valid").argmax()])
        return _unless_zero(peak, step / 2)

    def _distribution(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the edges of the bins from the least value to the greatest, and the share below each."""
        ordered = torch.cat([self._counts[1].flip(0), self._counts[0]]).numpy()
        places = ordered.nonzero()[0]
        first, last = places[0], places[-1]
        keys = np.arange(first, last + 2) - _BINS
        magnitudes = (np.abs(keys).astype(np.int32) << _DROPPED_BITS).view(np.float32).astype(np.float64)
        below = np.insert(ordered[first : last + 1].cumsum(), 0, 0) / self.count
        return np.sign(keys) * magnitudes, below

    @property
    def _magnitudes(self) -> torch.Tensor:
        return self._counts.sum(0)


def merged(sketches: Iterable[Sketch]) -> Sketch:
    """Return one sketch of everything that the others counted."""
    total = Sketch()
    for sketch in sketches:
        total.merge(sketch)
    return total


@functools.cache
def cuts() -> np.ndarray:
    """Return the greatest value of each bin, ascending: where a sketch splits its values exactly.

    The bin around zero has 0 itself: what is smaller than 1e-40 counts as zero.
    """
    keys = np.arange(_FINITE + 1, dtype=np.int32) << _DROPPED_BITS
    magnitudes = keys[:-1].view(np.float32)
    greatest = (keys[2:] - 1).view(np.float32)
    return np.concatenate([-magnitudes[:0:-1], [0.0], greatest]).astype(np.float64)


def common_value_at(sketches: Sequence[Sketch], share: float) -> float:
    """Return the least of `cuts()` that at least this share of values is at most, as a mean over sketches."""
    shares = np.mean([sketch.shares() for sketch in sketches], axis=0)
    return float(cuts()[np.searchsorted(shares, share)])


def _count(keys: torch.Tensor) -> torch.Tensor:
    """Return how often each key occurs; unlike bincount, it lets no GPU wait."""
    if keys.device.type == "cpu":
        return torch.bincount(keys, minlength=2 * _BINS)
    counts = torch.zeros(2 * _BINS, dtype=torch.int64, device=keys.device)
    return counts.scatter_add_(0, keys.long(), torch.ones_like(keys, dtype=torch.int64))


def _values_at(shares: Sequence[float], edges: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return the least values that shares greater than 0 are below."""
    bins = np.searchsorted(below, shares) - 1
    inside = (np.array(shares) - below[bins]) / (below[bins + 1] - below[bins])
    return edges[bins] + inside * (edges[bins + 1] - edges[bins])


def _shares(cuts: np.ndarray, edges: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return the share of values between neighbouring cuts."""
    return np.diff(np.interp(cuts, edges, below))


def _deviation(values: np.ndarray, shares: np.ndarray) -> float:
    mean = np.average(values, weights=shares)
    return float(np.sqrt(np.average((values - mean) ** 2, weights=shares)))


def _edges(key: int) -> tuple[float, float]:
    """Return the least magnitude of a bin, and that of the next one."""
    keys = torch.tensor([key, key + 1], dtype=torch.int32) << _DROPPED_BITS
    lower, upper = keys.view(torch.float32).tolist()
    return lower, upper


def _unless_zero(value: float, width: float = 0.0) -> float:
    """Return a value, or 0 if it is nearer to it than `width`, or in the bin of 0."""
    return 0.0 if abs(value) <= max(width, _edges(0)[1]) else value
