"""Distributions of activations in bounded memory.

Values are counted by the leading 16 bits of their float32: sign, exponent and 7 bits of mantissa, in the
order of the numbers. A bin is less than 1 % wide (2**-7 of its lower edge), at any scale, with nothing to
choose beforehand. Counts are whole numbers, so sketches of parts of a text add up to the sketch of all of it.
"""

from collections.abc import Iterable

import torch

_DROPPED_BITS = 16
_BINS = 1 << 15
RELATIVE_ERROR = 2.0**-7
"""How far a value of a sketch may be from the true one, relative to it."""


class Sketch:
    """Counts of values. `share_below` and `quantile` are of magnitudes, `median` and `mode` of the values."""

    def __init__(self) -> None:
        self._counts = torch.zeros(2, _BINS, dtype=torch.int64)
        """Of values with sign + and sign -, by magnitude."""

    @property
    def count(self) -> int:
        """How many values were added."""
        return int(self._counts.sum())

    def add(self, values: torch.Tensor) -> None:
        """Count every value of a floating-point tensor. They must be finite."""
        bits = values.detach().float().contiguous().view(torch.int32).flatten()
        keys = (bits >> _DROPPED_BITS) & (2 * _BINS - 1)
        self._counts += torch.bincount(keys, minlength=2 * _BINS).view(2, _BINS).cpu()

    def merge(self, other: "Sketch") -> None:
        self._counts += other._counts

    def share_below(self, threshold: float) -> float:
        """Return the share of magnitudes below a threshold; within a bin they count as evenly spread."""
        bits = torch.tensor(threshold, dtype=torch.float32).view(torch.int32).item()
        key = min(int(bits) >> _DROPPED_BITS, _BINS - 1)
        below, inside = self._magnitudes[:key].sum().item(), self._magnitudes[key].item()
        lower, upper = _edges(key)
        return (below + inside * (threshold - lower) / (upper - lower)) / max(self.count, 1)

    def quantile(self, share: float) -> float:
        """Return the threshold that this share of magnitudes is below; 0 for a share of 0."""
        wanted = share * self.count
        if wanted <= 0:
            return 0.0
        cumulative = self._magnitudes.cumsum(0)
        key = int(torch.searchsorted(cumulative, wanted))
        key = min(key, int(self._magnitudes.nonzero().max()))
        before = cumulative[key].item() - self._magnitudes[key].item()
        lower, upper = _edges(key)
        return lower + (upper - lower) * (wanted - before) / self._magnitudes[key].item()

    def median(self) -> float:
        """Return the value that half of the values are below."""
        ordered = torch.cat([self._counts[1].flip(0), self._counts[0]])
        place = int(torch.searchsorted(ordered.cumsum(0), (self.count + 1) // 2))
        return _signed_middle(place - _BINS)

    def mode(self, num_bins: int = 256) -> float:
        """Return the centre of the densest of `num_bins` equal bins within the middle 98 % of the values,
        smoothed by a Gaussian over neighbours (Silverman's width): the peak of a kernel density estimate."""
        ordered = torch.cat([self._counts[1].flip(0), self._counts[0]]).double()
        places = ordered.nonzero()[:, 0]
        values = torch.tensor([_signed_middle(int(place) - _BINS) for place in places], dtype=torch.float64)
        weights = ordered[places]
        total, cumulative = weights.sum(), weights.cumsum(0)
        low, high = (values[torch.searchsorted(cumulative, total * share)] for share in (0.01, 0.99))
        if not low < high:
            return float(low)
        grid = torch.linspace(float(low), float(high), num_bins, dtype=torch.float64)
        mean = (weights * values).sum() / total
        inside = (values >= low) & (values <= high)
        deviation = ((weights * (values - mean) ** 2)[inside].sum() / weights[inside].sum()).sqrt()
        width = max(float(1.06 * deviation * total ** (-0.2)), float(high - low) / num_bins)
        density = torch.zeros_like(grid)
        for value, weight in zip(values[inside], weights[inside], strict=True):
            density += weight * torch.exp(-0.5 * ((grid - value) / width) ** 2)
        return float(grid[density.argmax()])

    @property
    def _magnitudes(self) -> torch.Tensor:
        return self._counts.sum(0)


def merged(sketches: Iterable[Sketch]) -> Sketch:
    """Return one sketch of everything that the others counted."""
    total = Sketch()
    for sketch in sketches:
        total.merge(sketch)
    return total


def _edges(key: int) -> tuple[float, float]:
    """Return the least magnitude of a bin, and that of the next one."""
    keys = torch.tensor([key, key + 1], dtype=torch.int32) << _DROPPED_BITS
    lower, upper = keys.view(torch.float32).tolist()
    return lower, upper


def _signed_middle(place: int) -> float:
    """Return the middle of the bin that stands `place` bins above zero, or below it."""
    key = place if place >= 0 else -place - 1
    middle = sum(_edges(key)) / 2 if key else 0.0
    return middle if place >= 0 else -middle
