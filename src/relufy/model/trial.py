"""Trying masks out: hooks that change what a site sees, put on and taken off in no time.

What is tried here is not saved and not checked; `apply_sparsity` makes a model that can be saved.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from relufy.model.structure import BlockSites

Mask = Callable[[torch.Tensor], torch.Tensor]
"""From what is at a site, `[..., channels]`, to what its readers see instead."""
Correction = Callable[[torch.Tensor], torch.Tensor]
"""From what a mask left out, `[..., in]`, to what is added to the projection's output, `[..., out]`."""


class Trial:
    """The masks that are being tried, by layer and site. A fused projection is named by any of its sites."""

    def __init__(self, blocks: Sequence[BlockSites]) -> None:
        self._blocks = blocks
        self._masks: dict[str, Mask] = {}
        self._corrections: dict[str, Correction] = {}
        self._left_out: dict[str, torch.Tensor] = {}

    def put(self, layer: int, site: str, mask: Mask | None, correction: Correction | None = None) -> None:
        """Try a mask at a site, instead of what was tried there; None leaves the site as it is."""
        name = self._name(layer, site)
        self._masks.pop(name, None)
        self._corrections.pop(name, None)
        if mask is not None:
            self._masks[name] = mask
        if correction is not None:
            self._corrections[name] = correction

    def clear(self) -> None:
        self._masks.clear()
        self._corrections.clear()

    def _name(self, layer: int, site: str) -> str:
        block = self._blocks[layer]
        return block.activation.name if site == "neuron" else block.projections()[site].name

    def _mask_input(self, name: str, args: tuple) -> tuple | None:
        if name not in self._masks:
            return None
        masked = self._masks[name](args[0])
        if name in self._corrections:
            self._left_out[name] = args[0] - masked
        return (masked, *args[1:])

    def _correct(self, name: str, output: torch.Tensor) -> torch.Tensor | None:
        if name not in self._corrections:
            return None
        return output + self._corrections[name](self._left_out.pop(name))

    def _mask_output(self, name: str, output: torch.Tensor) -> torch.Tensor | None:
        return self._masks[name](output) if name in self._masks else None


@contextmanager
def trial_masks(blocks: Sequence[BlockSites]) -> Iterator[Trial]:
    """Try masks on a model, given its blocks, while this context lasts. They act behind the model's own."""
    trial = Trial(blocks)
    with ExitStack() as hooks:
        for block in blocks:
            for projection in {p.name: p for p in block.projections().values()}.values():
                before, after = _projection_hooks(trial, projection.name)
                hooks.callback(projection.module.register_forward_pre_hook(before).remove)
                hooks.callback(projection.module.register_forward_hook(after).remove)
            hook = _activation_hook(trial, block.activation.name)
            hooks.callback(block.activation.module.register_forward_hook(hook).remove)
        yield trial


def keep_at_least(threshold: float) -> Mask:
    """Return the mask that keeps entries of at least this magnitude."""
    return lambda x: torch.where(x.abs() >= threshold, x, 0)


def _projection_hooks(trial: Trial, name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return (
        lambda _module, args: trial._mask_input(name, args),
        lambda _module, _args, output: trial._correct(name, output),
    )


def _activation_hook(trial: Trial, name: str) -> Callable[..., Any]:
    return lambda _module, _args, output: trial._mask_output(name, output)
