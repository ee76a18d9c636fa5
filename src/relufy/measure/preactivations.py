"""How the pre-activations of each layer are distributed, and the sparsity that follows from it (ReLU Strikes
Back, arXiv 2310.04564, sections 5.1 and 5.3).

A pre-activation z is what the MLP's activation gets: the gate's output, in a plain MLP the up projection's,
bias included. `relu(z - b)` is zero where z <= b, so its sparsity is the distribution's value at b. The paper
finds that a fine-tune barely moves the distribution: what it says of the original holds for the relufied
model. Here a text is streamed once into sketches, whose memory does not grow with it.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from relufy.errors import UserError
from relufy.measure.batches import Batch
from relufy.measure.exact_sum import ExactSum, total
from relufy.measure.quality import evaluating
from relufy.measure.sketch import Sketch, cuts, merged
from relufy.model.structure import Activation, find_blocks
from relufy.processes import from_all
from relufy.text import check_windows

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
NUM_BINS = 256
"""Of a histogram, about; they share the middle 99.8 % evenly, and the rest is one bin at each end."""


@dataclass(frozen=True)
class LayerPreActivations:
    """A histogram: `counts[i]` values are above `edges[i]` and at most `edges[i + 1]`; 0 is an edge where
    values lie on both sides of it. As JSON: relufy.schema's to_mapping and from_mapping."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    mean: float
    deviation: float
    quantiles: tuple[float, ...]
    """At the shares QUANTILES."""

    def share_at_most(self, value: float) -> float:
        """Return the share of values that are at most this: exact at the edges, as even between them."""
        return float(self.shares_at_most([value])[0])

    def shares_at_most(self, values: Sequence[float]) -> np.ndarray:
        """Return `share_at_most` of each value, f64 `[values]`."""
        below = np.insert(np.cumsum(self.counts), 0, 0)
        return np.interp(values, self.edges, below) / below[-1]

    def value_at(self, share: float) -> float:
        """Return the least value that this share is at most, values within a bin taken as even."""
        return _common_value_at([self], share)


@dataclass(frozen=True)
class PreActivations:
    """The pre-activations of every layer over `tokens` positions (every position of every window)."""

    tokens: int
    layers: tuple[LayerPreActivations, ...]

    def sparsity(self, shift: float | Sequence[float] = 0.0) -> tuple[float, ...]:
        """Return the share of zeros that `relu(z - shift)` makes, by layer; one shift, or one for each."""
        shifts = [shift] * len(self.layers) if isinstance(shift, int | float) else shift
        return tuple(layer.share_at_most(b) for layer, b in zip(self.layers, shifts, strict=True))

    def mean_sparsity(self, shift: float | Sequence[float] = 0.0) -> float:
        """Return the mean over the layers, which all have the same width."""
        return sum(self.sparsity(shift)) / len(self.layers)

    def shift_for(self, sparsity: float) -> float:
        """Return the one shift that gives this sparsity as a mean over layers."""
        return _common_value_at(self.layers, sparsity)

    def shifts_for(self, sparsity: float) -> tuple[float, ...]:
        """Return the shift of each layer that gives it this sparsity."""
        return tuple(layer.value_at(sparsity) for layer in self.layers)


@dataclass(frozen=True)
class LayerMovement:
    """What became of a layer's distribution. Sparsities are those of a plain ReLU."""

    distance: float
    """The greatest difference between the shares at or below any value (Kolmogorov and Smirnov), 0 to 1."""
    mean_before: float
    mean_after: float
    deviation_before: float
    deviation_after: float
    sparsity_before: float
    sparsity_after: float


def measure_preactivations(
    model: PreTrainedModel, windows: np.ndarray, batch_size: int = 16
) -> PreActivations:
    """Run the model over windows, int64 `[windows, length]`, and return what its activations got.

    Raises UserError for a model that is not recognised, unfit windows, and values that are no finite numbers.
    """
    check_windows(windows, model.config.vocab_size)
    counts = PreActivationCounts(model)
    with ExitStack() as hooks, evaluating(model):
        counts.attach(hooks)
        for start in range(0, len(windows), batch_size):
            batch = torch.from_numpy(windows[start : start + batch_size]).to(model.device)
            counts.begin()
            model(input_ids=batch, use_cache=False, logits_to_keep=1)
            counts.end()
    return counts.result(int(windows.size))


def compare_preactivations(before: PreActivations, after: PreActivations) -> tuple[LayerMovement, ...]:
    """Return how far a fine-tune moved each layer's distribution. Raises UserError for another depth."""
    if len(before.layers) != len(after.layers):
        raise UserError(
            f"pre-activations of {len(before.layers)} and {len(after.layers)} layers are not of one model"
        )
    return tuple(_movement(*pair) for pair in zip(before.layers, after.layers, strict=True))


def _movement(before: LayerPreActivations, after: LayerPreActivations) -> LayerMovement:
    places = sorted({*before.edges, *after.edges})
    return LayerMovement(
        distance=float(np.abs(before.shares_at_most(places) - after.shares_at_most(places)).max()),
        mean_before=before.mean,
        mean_after=after.mean,
        deviation_before=before.deviation,
        deviation_after=after.deviation,
        sparsity_before=before.share_at_most(0.0),
        sparsity_after=after.share_at_most(0.0),
    )


class PreActivationCounts:
    """Add each pass's pre-activations, by hooks on the activations, and keep no more than sketches."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._layers = [_Layer(block.activation) for block in find_blocks(model)]

    def attach(self, hooks: ExitStack) -> None:
        """Hang the hooks, to be removed with the others."""
        for layer in self._layers:
            hooks.callback(layer.activation.module.register_forward_pre_hook(layer.see).remove)

    def begin(self, batch: Batch | None = None) -> None:
        """Begin a pass; of a batch, whose padding does not count."""
        for layer in self._layers:
            layer.begin(batch)

    def end(self) -> None:
        """End the pass. Raises UserError if something in it was no finite number."""
        for layer in self._layers:
            layer.end()

    def collect(self, tokens: int) -> PreActivations:
        """Return what all processes counted, of so many tokens in all; all of them must call this."""
        for layer, parts in zip(self._layers, zip(*from_all(self._state()), strict=True), strict=True):
            layer.restore(parts)
        return self.result(tokens)

    def result(self, tokens: int) -> PreActivations:
        """Return what was counted here."""
        return PreActivations(tokens, tuple(layer.result() for layer in self._layers))

    def _state(self) -> list["State"]:
        return [layer.state() for layer in self._layers]


State = tuple[Sketch, ExactSum, ExactSum]


class _Layer:
    """What is kept of a layer: a sketch, and the sums of values and squares, of each pass and of all."""

    def __init__(self, activation: Activation) -> None:
        self.activation = activation
        self._sketch, self._sum, self._squares = Sketch(), ExactSum(), ExactSum()
        self._pass: Any = None
        self._batch: Batch | None = None

    def begin(self, batch: Batch | None) -> None:
        self._batch, self._pass = batch, None

    def see(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        values: torch.Tensor = args[0].detach().float().flatten(0, -2)
        if self._batch is not None:
            values = self._batch.tokens_of(values)
        self._sketch.add(values)
        squares = torch.linalg.vector_norm(values, dim=-1).double().square()
        sums = torch.stack([values.sum(-1).double().sum(), squares.sum()])
        self._pass = sums if self._pass is None else self._pass + sums

    def end(self) -> None:
        if self._pass is None:
            return
        value, squares = self._pass.tolist()
        if not np.isfinite(squares):
            raise UserError(
                f"{self.activation.name} gets NaN or infinity; check the checkpoint, or load it in float32"
            )
        self._sum.add(value)
        self._squares.add(squares)

    def state(self) -> State:
        return self._sketch, self._sum, self._squares

    def restore(self, parts: Sequence[State]) -> None:
        """Take over what several processes have in all."""
        sketches, sums, squares = zip(*parts, strict=True)
        self._sketch, self._sum, self._squares = merged(sketches), total(sums), total(squares)

    def result(self) -> LayerPreActivations:
        count = max(self._sketch.count, 1)
        mean, square = float(self._sum) / count, float(self._squares) / count
        edges, counts = _histogram(self._sketch)
        deviation = max(square - mean**2, 0.0) ** 0.5
        quantiles = tuple(self._sketch.value_at(share) for share in QUANTILES)
        return LayerPreActivations(edges, counts, mean, deviation, quantiles)


def _histogram(sketch: Sketch) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Return edges, each where the sketch splits its values exactly, and the counts between them."""
    places, shares = cuts(), sketch.shares()
    used = np.flatnonzero(np.diff(shares, prepend=0.0))
    low, high = np.searchsorted(shares, [0.001, 0.999])
    wanted = np.searchsorted(places, np.linspace(places[low], places[high], NUM_BINS - 1))
    zero = np.searchsorted(places, 0.0)
    ends = max(used[0] - 1, 0), used[-1]
    chosen = np.unique([*ends, *np.clip([*wanted, zero], ends[0], ends[1])])
    below = np.rint(shares[chosen] * sketch.count).astype(np.int64)
    return tuple(places[chosen].tolist()), tuple(np.diff(below).tolist())


def _common_value_at(layers: Sequence[LayerPreActivations], share: float) -> float:
    """Return the least value that this share is at most, as a mean over layers."""
    if not 0 < share < 1:
        raise UserError(f"a sparsity lies between 0 and 1, found {share:g}")
    places = sorted({edge for layer in layers for edge in layer.edges})
    shares = np.mean([layer.shares_at_most(places) for layer in layers], axis=0)
    last = int(np.searchsorted(shares, share))
    inside = (share - shares[last - 1]) / (shares[last] - shares[last - 1])
    return places[last - 1] + float(inside) * (places[last] - places[last - 1])
