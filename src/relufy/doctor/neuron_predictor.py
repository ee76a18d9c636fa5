"""A low-rank linear predictor of which neurons a token needs, for any MLP: fitted in one pass, truncated.

It tells from the MLP's input which neurons are among the k of the greatest |a_i| ||W_down[:, i]|| (Deja Vu's
form, arXiv 2310.17157: two linears without a non-linearity; here least squares and its best low rank). What
`relufy predictor` makes for a ReLU model is stronger: it knows the gate.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from relufy.doctor.patient import Patient
from relufy.doctor.ridge import Ridge, refuse_large, with_one
from relufy.measure.modes import window_losses
from relufy.model.selections import greatest
from relufy.model.structure import BlockSites
from relufy.model.trial import trial_masks


@dataclass
class Overlap:
    """How many neurons of a layer were right, of those chosen and of those that count."""

    hits: float = 0.0
    chosen: float = 0.0
    wanted: float = 0.0

    def add(self, chosen: torch.Tensor, wanted: torch.Tensor) -> None:
        self.hits += float((chosen & wanted).sum())
        self.chosen += float(chosen.sum())
        self.wanted += float(wanted.sum())


class NeuronPredictor:
    """Scores of one layer's neurons, and how they did; it must see the MLP's input before down's."""

    def __init__(self, block: BlockSites, kept: int) -> None:
        self.block, self._kept = block, kept
        self._norms = block.down.matrix().float().norm(dim=0)
        self._ridge = Ridge()
        self._inputs = torch.zeros(0)
        self._inner = self._outer = torch.zeros(0)
        self.overlap = Overlap()

    def see(self, _module: Any, args: tuple[Any, ...]) -> None:
        self._inputs = args[0]

    def learn(self, _module: Any, args: tuple[Any, ...]) -> None:
        wanted = self.wanted(args[0]).flatten(0, -2).float()
        self._ridge.add(self._inputs.reshape(len(wanted), -1), wanted)

    def settle(self, rank: int) -> None:
        """Solve, and keep so many directions."""
        left, values, right = torch.linalg.svd(self._ridge.solve(), full_matrices=False)
        self._inner, self._outer = left[:, :rank] * values[:rank], right[:rank]
        self._ridge = Ridge()

    def wanted(self, x: torch.Tensor) -> torch.Tensor:
        """Return the neurons that matter and put out something, bool `[..., neurons]`, from down's input."""
        size = x.float().abs() * self._norms
        return greatest(size, self._kept) & (size > 0)

    def keep_predicted(self, x: torch.Tensor) -> torch.Tensor:
        """Return down's input with nothing but the neurons of the greatest scores."""
        scores = with_one(self._inputs) @ self._inner @ self._outer
        chosen = greatest(scores, self._kept).reshape(x.shape)
        self.overlap.add(chosen, self.wanted(x))
        return torch.where(chosen, x, torch.zeros_like(x))


def fit_neuron_predictors(patient: Patient, kept: int, rank: int) -> list[NeuronPredictor]:
    """Fit one for each layer on the fit windows. Raises UserError if that takes too much memory."""
    hidden, neurons = patient.blocks[0].up.shape[1], patient.blocks[0].down.shape[1]
    refuse_large(hidden, neurons, len(patient.blocks))
    layers = [NeuronPredictor(block, kept) for block in patient.blocks]
    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(_seeing(layer))
            hooks.callback(layer.block.down.module.register_forward_pre_hook(layer.learn).remove)
        window_losses(patient.model, patient.fit, patient.scored, patient.effort.batch_size)
    for layer in layers:
        layer.settle(rank)
    return layers


@contextmanager
def predicted_masks(patient: Patient, layers: list[NeuronPredictor]) -> Iterator[None]:
    """Compute nothing but predicted neurons while this lasts."""
    with ExitStack() as hooks:
        trial = hooks.enter_context(trial_masks(patient.blocks))
        for layer in layers:
            hooks.enter_context(_seeing(layer))
            trial.put(layer.block.index, "down", partial(_keep, layer))
        yield


def _keep(layer: NeuronPredictor, x: torch.Tensor) -> torch.Tensor:
    return layer.keep_predicted(x)


@contextmanager
def _seeing(layer: NeuronPredictor) -> Iterator[None]:
    """Show a predictor what the MLP reads; a fused gate and up reads it once."""
    handle = layer.block.up.module.register_forward_pre_hook(layer.see)
    try:
        yield
    finally:
        handle.remove()
