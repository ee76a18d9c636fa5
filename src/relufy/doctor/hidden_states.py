"""How large hidden states are where they enter each block: at the first tokens, and at the others."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from relufy.doctor.patient import Patient
from relufy.methods.calibrate import hidden_states_of, is_massive


def hidden_by_position(patient: Patient, first: int) -> dict[str, Any]:
    """Run the test windows once; `first` positions of each window are told apart from the rest."""
    layers = [_Layer(first) for _ in patient.blocks]
    with ExitStack() as hooks:
        for layer, block in zip(layers, patient.blocks, strict=True):
            module = patient.model.get_submodule(block.name)
            hooks.callback(module.register_forward_pre_hook(_watch(layer), with_kwargs=True).remove)
        patient.run()
    ratios = [layer.greatest / max(layer.median, 1e-12) for layer in layers]
    return {
        "greatest_by_layer": [layer.greatest for layer in layers],
        "greatest_elsewhere_by_layer": [layer.elsewhere for layer in layers],
        "median_by_layer": [layer.median for layer in layers],
        "massive_layers": [index for index, layer in enumerate(layers) if layer.massive],
        "massive_tokens_by_layer": [layer.massive for layer in layers],
        "massive_elsewhere_by_layer": [layer.massive_elsewhere for layer in layers],
        "greatest_at_first": max(layer.greatest for layer in layers),
        "greatest_ratio": max(ratios),
    }


class _Layer:
    """Magnitudes in front of one block; `median` is the mean of the tokens' medians."""

    def __init__(self, first: int) -> None:
        self._first = first
        self.greatest = self.elsewhere = self._medians = 0.0
        self.massive = self.massive_elsewhere = self._passes = 0

    @property
    def median(self) -> float:
        return self._medians / max(self._passes, 1)

    def see(self, hidden: torch.Tensor) -> None:
        magnitude = hidden.detach().float().abs()
        self.greatest = max(self.greatest, float(magnitude[:, : self._first].max()))
        self.elsewhere = max(self.elsewhere, float(magnitude[:, self._first :].max()))
        self._medians += float(magnitude.median(-1).values.mean())
        self._passes += 1
        massive = is_massive(hidden)
        self.massive += int(massive[:, : self._first].sum())
        self.massive_elsewhere += int(massive[:, self._first :].sum())


def _watch(layer: _Layer) -> Callable[..., None]:
    return lambda _module, args, kwargs: layer.see(hidden_states_of(args, kwargs))
