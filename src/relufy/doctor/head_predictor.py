"""A linear predictor of which heads matter, from the input of attention: ridge regression in one pass.

It is the cheapest of Deja Vu's family (arXiv 2310.17157: two linears without a non-linearity, trained); it
reads the input of its own layer, so it has no look-ahead to pay for.
"""

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from relufy.doctor.head_masks import Heads
from relufy.doctor.patient import Patient
from relufy.errors import UserError
from relufy.measure.modes import window_losses

RIDGE = 1e-3
"""The penalty on the weights, relative to the mean square of an input."""
MOST_BYTES = 2e9
"""What all layers' normal equations may take."""


class HeadPredictor:
    """Scores of heads by a linear map of q's input; `see` must be attached while the model runs."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        self._weights = weights
        self._inputs: dict[int, torch.Tensor] = {}

    def see(self, layer: int, _module: Any, args: tuple[Any, ...]) -> None:
        self._inputs[layer] = args[0]

    def score(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """Return the predicted importance of each head, `[..., heads]`; x only gives the shape."""
        found = _with_one(self._inputs[layer]) @ self._weights[layer]
        return found.reshape(*x.shape[:-1], found.shape[-1])

    def attached(self, patient: Patient) -> ExitStack:
        """Watch the inputs of every q for as long as the returned context lasts."""
        hooks = ExitStack()
        for block in patient.blocks:
            hook = block.q.module.register_forward_pre_hook(partial(self.see, block.index))
            hooks.callback(hook.remove)
        return hooks


def fit_head_predictor(patient: Patient, heads: Heads) -> HeadPredictor:
    """Fit all layers' predictors on the fit windows. Raises UserError if they would not fit in memory."""
    width = patient.blocks[0].q.shape[1] + 1
    if 8.0 * width**2 * len(patient.blocks) > MOST_BYTES:
        raise UserError(
            f"normal equations of {width - 1} inputs in {len(patient.blocks)} layers are too large"
        )
    sums = [_Sums(heads, block.index) for block in patient.blocks]
    with ExitStack() as hooks:
        for block, layer in zip(patient.blocks, sums, strict=True):
            hooks.callback(block.q.module.register_forward_pre_hook(layer.see_input).remove)
            hooks.callback(block.o.module.register_forward_pre_hook(layer.see_output).remove)
        window_losses(patient.model, patient.fit, patient.scored, patient.effort.batch_size)
    return HeadPredictor([layer.solve() for layer in sums])


class _Sums:
    """X^T X and X^T Y of a layer, X the input of q with a one, Y the heads' importance."""

    def __init__(self, heads: Heads, layer: int) -> None:
        self._heads, self._layer = heads, layer
        self._inputs = torch.zeros(0)
        self._squares: Any = 0.0
        self._products: Any = 0.0

    def see_input(self, _module: Any, args: tuple[Any, ...]) -> None:
        self._inputs = _with_one(args[0]).flatten(0, -2)

    def see_output(self, _module: Any, args: tuple[Any, ...]) -> None:
        importance = self._heads.importance(self._layer, args[0]).flatten(0, -2).double()
        inputs = self._inputs.double()
        self._squares = self._squares + inputs.T @ inputs
        self._products = self._products + inputs.T @ importance

    def solve(self) -> torch.Tensor:
        ridge = RIDGE * self._squares.diagonal().mean()
        identity = torch.eye(len(self._squares), dtype=torch.float64, device=self._squares.device)
        return torch.linalg.solve(self._squares + ridge * identity, self._products).float()


def _with_one(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.float(), torch.ones_like(x[..., :1], dtype=torch.float32)], dim=-1)
