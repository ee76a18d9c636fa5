"""The activations with exact zeros: functions of the pre-activation, for the site `neuron`."""

from statistics import NormalDist
from typing import Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx
from transformers.activations import ACT2FN

from relufy.activation_sparsity import FATRELU, HELU_WIDTH, RELUFY_ACT, Sparsifier
from relufy.errors import UserError


class ReLU(nn.Module):
    """`relu(x - shift)`."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.relu(self._shifted(x))

    def extra_repr(self) -> str:
        return f"shift={self.shift}" if self.shift else ""

    def _shifted(self, x: torch.Tensor) -> torch.Tensor:
        return (widened(x) - self.shift).to(x.dtype) if self.shift else x


class SquaredReLU(ReLU):
    """`relu(x - shift) ** 2`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.square(super().forward(x))


class FatReLU(nn.Module):
    """`x` where `x >= threshold`, else 0."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # "not below" rather than "at least": what is no number stays so, as in ReLU.
        return torch.where(widened(x) < self.threshold, torch.zeros_like(x), x)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"


class HeLU(ReLU):
    """`relu(x - shift)`, with gradient 1 where `x - shift > -width`."""

    def __init__(self, shift: float = 0.0, width: float = HELU_WIDTH) -> None:
        super().__init__(shift)
        self.width = width

    def extra_repr(self) -> str:
        return f"width={self.width}" + (f", shift={self.shift}" if self.shift else "")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Hysteresis.apply(self._shifted(x), self.width)  # type: ignore[return-value]


class _Hysteresis(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, width: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.width = width
        return nn.functional.relu(x)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Any) -> Any:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradients[0] * (x > -ctx.width), None  # type: ignore[attr-defined]


class StatisticalTopK(nn.Module):
    """`act(relu(x - cutoff))`, cutoff = mean(x) + std(x) * PhiInverse(sparsity) over the neurons.

    `act` is the model's own activation; the standard deviation is the population's.
    """

    def __init__(self, sparsity: float, activation: nn.Module) -> None:
        super().__init__()
        self.sparsity = sparsity
        self.deviations = NormalDist().inv_cdf(sparsity)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, deviation = x.mean(-1, keepdim=True), x.std(-1, keepdim=True, unbiased=False)
        return self.activation(nn.functional.relu(x - (mean + deviation * self.deviations)))

    def extra_repr(self) -> str:
        return f"sparsity={self.sparsity}"


class Placeholder(nn.Module):
    """The activation of a name that other parts of the configuration define. It refuses to compute."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise UserError(
            "this relufied model was loaded without its block; load it with relufy.load_model(folder)"
        )


def make_activation(sparsifier: Sparsifier, own: nn.Module) -> nn.Module:
    """Return the module of an activation; `own` is the one that the model had."""
    match sparsifier.function:
        case "relu2":
            return SquaredReLU(sparsifier.shift)
        case "helu":
            return HeLU(sparsifier.shift, sparsifier.width)
        case "fatrelu":
            return FatReLU(sparsifier.threshold or 0.0)
        case "statistical_topk":
            return StatisticalTopK(sparsifier.sparsity or 0.0, own)
    return ReLU(sparsifier.shift)  # relu, and drelu's gate


def stock_activation(name: str | None) -> nn.Module:
    """Return the activation that transformers knows by this name. Raises UserError if it knows none."""
    if name in (None, RELUFY_ACT, FATRELU) or name not in ACT2FN:
        raise UserError(
            f"config.json: the block says {name!r} of the model's own activation, which is no activation of "
            "transformers"
        )
    return ACT2FN[name]


def widened(x: torch.Tensor) -> torch.Tensor:
    """Return x in float32 if it is narrower, so that a cut is compared with it unrounded."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
