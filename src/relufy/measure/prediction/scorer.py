"""A layer's low-rank scores, before it is decided how many neurons they let through."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from relufy.model.predictor import NeuronPredictor


@dataclass(frozen=True)
class Scorer:
    """Scores `outer (inner x)` of x `[..., hidden]`, each neuron's with a base and a scale of its own.

    The margin `(score - base) / scale` is about how sure it is that a neuron is active. One offset to all
    margins of a layer makes them a predictor.
    """

    inner: torch.Tensor
    """Float32 `[rank, hidden]`."""
    outer: torch.Tensor
    """Float32 `[neurons, rank]`."""
    base: torch.Tensor
    """Float32 `[neurons]`."""
    scale: torch.Tensor
    """Float32 `[neurons]`, positive."""

    @property
    def rank(self) -> int:
        return self.inner.shape[0]

    def margins(self, x: torch.Tensor) -> torch.Tensor:
        """Return the margins of x, float32 `[..., neurons]`."""
        return (F.linear(F.linear(x, self.inner), self.outer) - self.base) / self.scale

    def predictor(self, offset: float) -> NeuronPredictor:
        """Return the predictor that lets the neurons through whose margin is at least `offset`."""
        return NeuronPredictor(self.inner, self.outer, self.base + offset * self.scale)
