"""Modules that were made sparse in place: their class changes, their parameters and the names of these stay.

A norm passes its output through a sparsifier, a projection its input; the up projection of a dReLU model also
passes its output through a ReLU.
"""

from functools import cache
from typing import Any

import torch
from torch import nn

from relufy.errors import UserError
from relufy.model.activations import ReLU
from relufy.model.selections import Selection


class SparseModule:
    """What every module made sparse is, beside what it was."""

    dense_class: type[nn.Module]
    changes: tuple[type, ...]


class SparseOutput(SparseModule):
    """Passes the output through `sparsifier`."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.sparsifier(super().forward(*args, **kwargs))  # type: ignore[attr-defined,misc]


class SparseInput(SparseModule):
    """Passes the input through `sparsifier`, and adds its correction."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sparsifier: Selection = self.sparsifier  # type: ignore[attr-defined]
        kept = sparsifier(x)
        y = super().forward(kept)  # type: ignore[misc]
        return y if sparsifier.low_rank_in is None else y + sparsifier.correction(x - kept)


class RectifiedOutput(SparseModule):
    """Passes the output through `rectifier`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rectifier(super().forward(x))  # type: ignore[attr-defined,misc]


def sparsify_output(module: nn.Module, sparsifier: nn.Module) -> None:
    _change(module, SparseOutput)
    module.sparsifier = sparsifier.train(module.training)


def sparsify_input(module: nn.Module, sparsifier: Selection) -> None:
    _change(module, SparseInput)
    module.sparsifier = sparsifier.train(module.training)


def rectify_output(module: nn.Module) -> None:
    _change(module, RectifiedOutput)
    module.rectifier = ReLU().train(module.training)


def make_dense(module: nn.Module) -> None:
    """Undo what was done to the module, if anything was."""
    if isinstance(module, SparseModule):
        module.__class__ = module.dense_class  # type: ignore[assignment]
        for name in ("sparsifier", "rectifier"):
            if name in module._modules:
                delattr(module, name)


class AdapterGuard:
    """A forward pre-hook of the stack of blocks that refuses adapters around sparse projections.

    Such an adapter would be trained on inputs that the projection does not see.
    """

    def __init__(self, projections: list[str]) -> None:
        self.projections = projections
        """Their names within the stack."""

    def __call__(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for name in self.projections:
            if not isinstance(module := stack.get_submodule(name), SparseModule):
                raise UserError(
                    f"{name} has a sparsifier of its own, which the {type(module).__name__} around it would "
                    "not see; leave it out of the adapter's target modules"
                )


def _change(module: nn.Module, change: type) -> None:
    is_sparse = isinstance(module, SparseModule)
    base, changes = (module.dense_class, module.changes) if is_sparse else (type(module), ())  # type: ignore[union-attr]
    if change not in changes:
        module.__class__ = _sparse_class(base, (change, *changes))


@cache
def _sparse_class(base: type[nn.Module], changes: tuple[type, ...]) -> type[nn.Module]:
    def reduce(self: Any) -> tuple:
        return _new_sparse, (base, changes), self.__dict__

    members = {
        "__reduce__": reduce,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "dense_class": base,
        "changes": changes,
    }
    return type(f"Sparse{base.__name__}", (*changes, base), members)


def _new_sparse(base: type[nn.Module], changes: tuple[type, ...]) -> nn.Module:
    cls = _sparse_class(base, changes)
    return cls.__new__(cls)
