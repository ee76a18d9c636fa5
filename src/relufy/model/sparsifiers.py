"""The functions that make zeros, and putting them on a model.

`neuron` replaces the MLP's activation module. A shared input (q k v, or gate up) gets its sparsifier where
the input is made, on the norm's output, so that every reader sees it, LoRA adapters too.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.errors import UserError
from relufy.model.compatibility import adds_zeros, check_sparsity
from relufy.model.configuration import find_activation_key, refuse_quantized, sparsity_of, write_sparsity
from relufy.model.sites import find_sites
from relufy.model.structure import BlockSites, find_blocks


class ReLU(nn.Module):
    """`relu(x - shift)`."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.relu(x - self.shift if self.shift else x)

    def extra_repr(self) -> str:
        return f"shift={self.shift}" if self.shift else ""


class SquaredReLU(ReLU):
    """`relu(x - shift) ** 2`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.square(super().forward(x))


class Placeholder(nn.Module):
    """The activation named "relufy", before the block said which function it is. It refuses to compute."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise UserError(
            "this relufied model was loaded without its block; load it with relufy.load_model(folder)"
        )


FUNCTIONS: dict[str, Callable[[float], nn.Module]] = {"relu": ReLU, "relu2": SquaredReLU}


def make_sparsifier(sparsifier: Sparsifier) -> nn.Module:
    """Return the module that computes the sparsifier's function."""
    return FUNCTIONS[sparsifier.function](sparsifier.shift)


def apply_sparsity(model: PreTrainedModel, sparsity: ActivationSparsity) -> PreTrainedModel:
    """Put sparsifiers on the model and write its configuration, in place; return the model.

    A model that has all of them already is left as it is, with a warning. Raises UserError for what the model
    cannot have, and for what would take back or change the zeros that it has.
    """
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"expected a transformers model, found {type(model).__name__}; merge its adapters first"
        )
    refuse_quantized(model.config.to_dict(), type(model).__name__)
    blocks = find_sites(model)
    check_sparsity(blocks, sparsity)
    present = sparsity_of(model)
    if not adds_zeros(len(blocks), present, sparsity):
        warnings.warn("the model has these sparsifiers already; nothing was changed", stacklevel=2)
        return model
    key = find_activation_key(model, [block.activation.name for block in blocks])
    _put_activations(blocks, sparsity)
    _put_on_norms(blocks, sparsity)
    write_sparsity(model, sparsity, key)
    return model


def install_sparsity(model: PreTrainedModel) -> None:
    """Put the sparsifiers that the model's configuration describes on it, in place. Twice is harmless."""
    sparsity = sparsity_of(model)
    # The activations first: a placeholder would not run the token that finds the norms.
    _put_activations(find_blocks(model), sparsity)
    blocks = find_sites(model)
    check_sparsity(blocks, sparsity)
    _put_on_norms(blocks, sparsity)


def _put_activations(blocks: Sequence[BlockSites], sparsity: ActivationSparsity) -> None:
    for block in blocks:
        if neuron := sparsity.at("neuron", block.index):
            module = make_sparsifier(neuron).train(block.activation.module.training)
            setattr(block.activation.owner, block.activation.attribute, module)


def _put_on_norms(blocks: Sequence[BlockSites], sparsity: ActivationSparsity) -> None:
    for block in blocks:
        for norm, readers in block.shared_inputs():
            if norm is not None and (shared := sparsity.at(readers[0], block.index)):
                _sparsify_output(norm.module, make_sparsifier(shared))


def _sparsify_output(norm: nn.Module, sparsifier: nn.Module) -> None:
    """Let the norm's output pass through the sparsifier; its parameters and their names stay."""
    if not hasattr(norm, "sparsifier"):
        norm.__class__ = _sparse_class(type(norm))
    norm.sparsifier = sparsifier.train(norm.training)


@cache
def _sparse_class(base: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.sparsifier(base.forward(self, *args, **kwargs))

    def reduce(self: Any) -> tuple:
        return _new_sparse, (base,), self.__dict__

    members = {
        "forward": forward,
        "__reduce__": reduce,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
    }
    return type(f"Sparse{base.__name__}", (base,), members)


def _new_sparse(base: type[nn.Module]) -> nn.Module:
    cls = _sparse_class(base)
    return cls.__new__(cls)
