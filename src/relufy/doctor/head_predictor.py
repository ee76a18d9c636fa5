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
from relufy.doctor.ridge import Ridge, refuse_large, with_one
from relufy.measure.modes import window_losses


class HeadPredictor:
    """Scores of heads by a linear map of q's input; `see` must be attached while the model runs."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        self._weights = weights
        self._inputs: dict[int, torch.Tensor] = {}

    def see(self, layer: int, _module: Any, args: tuple[Any, ...]) -> None:
        self._inputs[layer] = args[0]

    def score(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """Return the predicted importance of each head, `[..., heads]`; x only gives the shape."""
        found = with_one(self._inputs[layer]) @ self._weights[layer]
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
    refuse_large(patient.blocks[0].q.shape[1], max(heads.count), len(patient.blocks))
    sums = [_Sums(heads, block.index) for block in patient.blocks]
    with ExitStack() as hooks:
        for block, layer in zip(patient.blocks, sums, strict=True):
            hooks.callback(block.q.module.register_forward_pre_hook(layer.see_input).remove)
            hooks.callback(block.o.module.register_forward_pre_hook(layer.see_output).remove)
        window_losses(patient.model, patient.fit, patient.scored, patient.effort.batch_size)
    return HeadPredictor([layer.solve() for layer in sums])


class _Sums:
    """What is seen of a layer: the input of q, and the heads' importance."""

    def __init__(self, heads: Heads, layer: int) -> None:
        self._heads, self._layer = heads, layer
        self._inputs = torch.zeros(0)
        self._ridge = Ridge()

    def see_input(self, _module: Any, args: tuple[Any, ...]) -> None:
        self._inputs = args[0].flatten(0, -2)

    def see_output(self, _module: Any, args: tuple[Any, ...]) -> None:
        self._ridge.add(self._inputs, self._heads.importance(self._layer, args[0]).flatten(0, -2))

    def solve(self) -> torch.Tensor:
        return self._ridge.solve()
