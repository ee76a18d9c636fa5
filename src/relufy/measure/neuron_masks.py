"""Zeroing neurons while a model runs, behind its own masks: to try what would be lost, never to be saved."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from relufy.errors import UserError
from relufy.model.selections import Selection
from relufy.model.structure import BlockSites, find_blocks

NeuronMask = Callable[[int, torch.Tensor], torch.Tensor]
"""From a layer and the neurons' values, `[..., neurons]`, to the values that are used instead."""


@contextmanager
def masked_neurons(model: PreTrainedModel, site: str, mask: NeuronMask) -> Iterator[None]:
    """Change neurons at `neuron` (the activation's output) or `down` (its input) while this lasts.

    Where a mask of the model has a centre, that counts as 0. Raises UserError where down reads a rotated
    basis, in which there are no neurons.
    """
    with ExitStack() as hooks:
        for block in find_blocks(model):
            hooks.callback(_attach(block, site, partial(mask, block.index)).remove)
        yield


def _attach(block: BlockSites, site: str, mask: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    def after(_module: nn.Module, _args: tuple, output: torch.Tensor) -> torch.Tensor:
        return mask(output)

    def before(_module: nn.Module, args: tuple) -> tuple:
        return mask(args[0]), *args[1:]

    if site == "neuron":
        return block.activation.module.register_forward_hook(after)

    module: nn.Module = block.down.module
    own: Any = getattr(module, "sparsifier", None)
    if not isinstance(own, Selection):
        return module.register_forward_pre_hook(before)
    if own.rotation is not None:
        raise UserError(f"{block.down.name} reads a rotated basis, in which there are no neurons to mask")

    def behind_own(_module: nn.Module, _args: tuple, output: torch.Tensor) -> torch.Tensor:
        return mask(output) if own.centre is None else mask(output - own.centre) + own.centre

    return own.register_forward_hook(behind_own)
