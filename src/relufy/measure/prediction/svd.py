"""Predictors without training: the gate's singular value decomposition, alone or where a text's inputs lie.

The gate's output z = W x + b is active above a cut. A plain decomposition approximates W; the inputs of a
text fill few directions of the hidden space, so the other one approximates W x in the mean square over them:
the left singular vectors U of W C^(1/2), C the inputs' covariance, give outer = U, inner = U^T W. Rows are
taken in units of their own output's deviation, for a neuron's sign matters, not its size; and what each row
lost, as the text shows it, says how far below the cut its score may lie (`Scorer.scale`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from relufy.measure.prediction.scorer import Scorer
from relufy.measure.prediction.states import LayerStates, Progress, stream_states
from relufy.model.predictor import PredictedLayer, cuts

LEAST_SCALE = 1e-4
"""Of a margin, in deviations of the neuron's own pre-activation: rounding is not certainty."""
LEAST_VARIANCE = 1e-8
"""Of a direction of the inputs, relative to the mean one: beneath it lies rounding."""


@dataclass
class Moments:
    """Sums over a layer's inputs: enough for their mean and covariance, in float64."""

    count: int = 0
    total: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    products: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x: torch.Tensor) -> None:
        """Count inputs `[positions, hidden]`."""
        self.count += len(x)
        self.total = self.total + x.sum(0, dtype=torch.float64)
        self.products = self.products + (x.T @ x).double()

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.count

    def covariance(self) -> torch.Tensor:
        return self.products / self.count - torch.outer(self.mean, self.mean)


def measure_moments(
    model: PreTrainedModel,
    layers: Sequence[PredictedLayer],
    windows: np.ndarray,
    progress: Progress = lambda _task, _done, _all: None,
) -> list[Moments]:
    """Return the moments of each layer's MLP inputs over windows, int64 `[windows, length]`."""
    found = {layer.index: Moments() for layer in layers}

    def see(states: LayerStates) -> None:
        found[states.layer.index].add(states.inputs)

    stream_states(model, layers, windows, see, "reading inputs", progress)
    return [found[layer.index] for layer in layers]


def gate_of(layer: PredictedLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight `[neurons, hidden]` and bias `[neurons]` of what the activation reads, float64."""
    projection, rows = layer.projection, slice(0, layer.neurons)  # of a fused gate and up, the gate is first
    weight = projection.matrix()[rows].double()
    bias: torch.Tensor | None = projection.module.bias  # type: ignore[assignment]
    return weight, bias.detach()[rows].double() if bias is not None else weight.new_zeros(layer.neurons)


def svd_scorer(layer: PredictedLayer, rank: int, moments: Moments) -> Scorer:
    """Return the scores that are nearest to the pre-activations of a text, given its moments.

    The rank is at most that of the gate.
    """
    weight, bias = gate_of(layer)
    root = _root(moments.covariance())
    deviation = (weight @ root).norm(dim=1).clamp_min(1e-12)
    scaled = weight / deviation[:, None]
    directions = torch.linalg.eigh(root.T @ (scaled.T @ scaled) @ root).eigenvectors.flip(1)[:, :rank]
    outer = torch.linalg.qr(scaled @ root @ directions).Q
    inner = outer.T @ scaled
    lost = scaled - outer @ inner
    base = (cuts(layer).double() - bias) / deviation - lost @ moments.mean
    scale = (lost @ root).norm(dim=1).clamp_min(LEAST_SCALE)
    return _scorer(inner, outer, base, scale)


def plain_svd_scorer(layer: PredictedLayer, rank: int) -> Scorer:
    """Return the scores of the gate's own truncated decomposition: no text says where inputs lie."""
    weight, bias = gate_of(layer)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    inner, outer = values[:rank, None] * right[:rank], left[:, :rank]
    return _scorer(inner, outer, cuts(layer).double() - bias, torch.ones_like(bias))


def _root(covariance: torch.Tensor) -> torch.Tensor:
    """Return R, `[hidden, hidden]`, with R R^T the covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(LEAST_VARIANCE * values.mean().clamp_min(1e-30)).sqrt()


def _scorer(inner: torch.Tensor, outer: torch.Tensor, base: torch.Tensor, scale: torch.Tensor) -> Scorer:
    return Scorer(*(tensor.float() for tensor in (inner, outer, base, scale)))
