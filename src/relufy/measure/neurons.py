"""Neurons that a text never makes active, and the sparsity of those that live.

A dead neuron is zero at every token, so it tells nothing of what a token needs: it could be pruned. Over the
live ones alone, a model with many dead neurons is less sparse than it looks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from relufy.measure.batches import Batch
from relufy.measure.zero_counts import HIGH, LOW, CollectedZeros, Key
from relufy.model.counting import count_columns
from relufy.processes import sums_over_processes

NEURON_SITES = ("neuron", "down")
"""Where a neuron can be zero: as the activation's output, and as the input of down."""


@dataclass(frozen=True)
class NeuronActivity:
    """Of one site, one value per layer, over `tokens` tokens; NaN where no neuron is alive."""

    tokens: int
    dead: tuple[float, ...]
    """The share of neurons that are zero at every token."""
    live_sparsity: tuple[float, ...]
    """The share of zeros among the other neurons: mean, 5th and 95th percentile over tokens."""
    live_p5: tuple[float, ...]
    live_p95: tuple[float, ...]


class NeuronCounts:
    """At how many tokens each neuron is zero."""

    def __init__(self, widths: Mapping[Key, int]) -> None:
        self._zeros = {
            key: torch.zeros(width, dtype=torch.int64)
            for key, width in widths.items()
            if key[0] in NEURON_SITES
        }
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def add(self, site: str, layer: int, is_zero: torch.Tensor, batch: Batch) -> None:
        """Add the zeros of a pass, bool `[rows, neurons]`."""
        key = site, layer
        if key not in self._zeros:
            return
        if self._last is None or self._last[0] is not is_zero:  # in a plain MLP both sites are one tensor
            self._last = is_zero, count_columns(_only_tokens(is_zero, batch))
        self._zeros[key] = self._zeros[key].to(is_zero.device) + self._last[1]

    def end(self) -> None:
        """Forget the running pass."""
        self._last = None

    def collect(self, found: CollectedZeros) -> dict[str, NeuronActivity]:
        """Return what all processes counted, by site; all of them must call this."""
        sums = dict(zip(self._zeros, sums_over_processes(list(self._zeros.values())), strict=True))
        return {site: _activity(site, sums, found) for site in dict.fromkeys(site for site, _ in sums)}


def _activity(site: str, zeros: Mapping[Key, torch.Tensor], found: CollectedZeros) -> NeuronActivity:
    layers = [_layer((name, layer), counts, found) for (name, layer), counts in zeros.items() if name == site]
    return NeuronActivity(found.tokens, *(tuple(column) for column in zip(*layers, strict=True)))


def _layer(key: Key, zeros: torch.Tensor, found: CollectedZeros) -> list[float]:
    """Return the share of dead neurons, and mean, p5 and p95 over the live ones.

    Dead neurons are among the zeros of every token, so percentiles over the live ones follow from those over
    all.
    """
    width, dead = len(zeros), int((zeros == found.tokens).sum())
    live = width - dead
    low, high = (found.percentile(key, percent) for percent in (LOW, HIGH))
    counts = (int(zeros.sum()) / found.tokens, low, high)
    return [dead / width, *((count - dead) / live if live else float("nan") for count in counts)]


def _only_tokens(is_zero: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the mask with False for padding."""
    return is_zero & batch.mask(is_zero.device).reshape(-1, 1) if batch.is_padded else is_zero
