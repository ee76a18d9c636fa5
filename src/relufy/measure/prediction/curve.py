"""How much a layer's scores let through at any offset: counts of margins, in bounded memory."""

from dataclasses import dataclass

import numpy as np
import torch

_DROPPED_BITS = 16
_BINS = 1 << 16
LEAST_OFFSET = -1e30
"""Finite, for checkpoints hold no infinities."""


@dataclass(frozen=True)
class Quality:
    """How well candidates cover the active neurons, over the positions and neurons of a layer."""

    recall: float
    """The share of active neurons that are candidates."""
    weighted_recall: float
    """That share of what active neurons put out: |a_i| norm(W_down[:, i])."""
    precision: float
    """The share of candidates that are active."""
    density: float
    """The share of neurons that are candidates."""
    active: float
    """The share of neurons that are active."""


class MarginCurve:
    """Counts margins by the leading 16 bits of their float32, as a sketch does; bins are ordered.

    Kept apart: all neurons, the active ones, and those weighed by what they put out.
    """

    def __init__(self) -> None:
        self._all = torch.zeros(_BINS, dtype=torch.int64)
        self._active = torch.zeros(_BINS, dtype=torch.int64)
        self._output = torch.zeros(_BINS, dtype=torch.float64)

    def add(self, margins: torch.Tensor, output: torch.Tensor) -> None:
        """Count margins `[positions, neurons]`; `output` is what each neuron puts out, 0 if inactive."""
        keys, active = _keys(margins), output != 0
        self._all += torch.bincount(keys.flatten(), minlength=_BINS).cpu()
        self._active += torch.bincount(keys[active], minlength=_BINS).cpu()
        weights = output[active].double()
        self._output += torch.bincount(keys[active], weights, minlength=_BINS).cpu()

    def offset_for(self, recall: float, weighted: bool = False) -> float:
        """Return the greatest offset, at the edge of a bin, that lets this share through.

        LEAST_OFFSET, which lets all through, where nothing was active.
        """
        counts = (self._output if weighted else self._active.double()).numpy()
        if not counts.sum():
            return LEAST_OFFSET
        above = counts[::-1].cumsum()[::-1]
        needed = recall * above[0] * (1 - 1e-12)
        return _lower_edge(int(np.flatnonzero(above >= needed)[-1]))

    def at(self, offset: float) -> Quality:
        """Return what an offset lets through; it counts as the lower edge of its bin."""
        first = int(_keys(torch.tensor([offset], dtype=torch.float32))[0])
        through = [float(counts[first:].sum()) for counts in (self._active, self._output, self._all)]
        whole = [float(counts.sum()) for counts in (self._active, self._output, self._all)]
        shares = [part / total if total else 1.0 for part, total in zip(through, whole, strict=True)]
        precision = through[0] / through[2] if through[2] else 1.0
        return Quality(shares[0], shares[1], precision, shares[2], whole[0] / max(whole[2], 1.0))


def _keys(values: torch.Tensor) -> torch.Tensor:
    """Return the bins of float32 values, int64, in the order of the numbers."""
    bits = values.detach().float().contiguous().view(torch.int32).long() & 0xFFFFFFFF
    leading = bits >> _DROPPED_BITS
    return torch.where(leading >= _BINS // 2, _BINS - 1 - leading, leading + _BINS // 2)


def _lower_edge(key: int) -> float:
    """Return the least value of a bin."""
    is_negative = key < _BINS // 2
    leading = _BINS - 1 - key if is_negative else key - _BINS // 2
    bits = (leading << _DROPPED_BITS) | (0xFFFF if is_negative else 0)
    return float(np.array([bits], dtype=np.uint32).view(np.float32)[0])
