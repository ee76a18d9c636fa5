"""Neurons that a text never needs: of exactly no output, or below a norm at every token."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from relufy.doctor.patient import Patient
from relufy.model.structure import Projection


@dataclass(frozen=True)
class Idle:
    """Shares of each layer's neurons over a text."""

    dead: tuple[float, ...]
    """Without any output at every token."""
    idle: tuple[float, ...]
    """Below the layer's norm at every token."""


def idle_neurons(patient: Patient, epsilons: tuple[float, ...]) -> Idle:
    """Run the test windows once. A norm is ||a_i W_down[:, i]||, one for each layer."""
    layers = [_Layer(block.down, norm) for block, norm in zip(patient.blocks, epsilons, strict=True)]
    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.down.module.register_forward_pre_hook(_watch(layer)).remove)
        patient.run()
    return Idle(tuple(_without(x.is_alive) for x in layers), tuple(_without(x.is_needed) for x in layers))


class _Layer:
    def __init__(self, down: Projection, epsilon: float) -> None:
        self.down, self._epsilon = down, epsilon
        self._norms = down.matrix().float().norm(dim=0)
        self.is_alive = torch.zeros(down.shape[1], dtype=torch.bool, device=self._norms.device)
        self.is_needed = self.is_alive.clone()

    def see(self, activations: torch.Tensor) -> None:
        size = activations.detach().flatten(0, -2).float().abs().amax(0) * self._norms
        self.is_alive |= size > 0
        self.is_needed |= (size >= self._epsilon) & (size > 0)


def _watch(layer: _Layer) -> Callable[..., None]:
    def see(_module: Any, args: tuple[Any, ...]) -> None:
        layer.see(args[0])

    return see


def _without(flags: torch.Tensor) -> float:
    return 1.0 - float(flags.float().mean())
