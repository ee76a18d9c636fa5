"""The tensors of sparsifiers: thresholds, weights, centres, low-rank factors, rotations; which there must be,
and where they come from."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from relufy.errors import UserError
from relufy.model.places import Place
from relufy.model.selections import Selection


def checked_tensors(
    places: Sequence[Place], tensors: Mapping[str, torch.Tensor], where: str
) -> dict[str, torch.Tensor]:
    """Return the tensors that these places need, by their names in a checkpoint.

    Raises UserError if one is missing, unknown, has another shape or holds what is no number.
    """
    shapes = {place.checkpoint_name(n): shape for place in places for n, shape in place.tensors().items()}
    if unknown := sorted(set(tensors) - set(shapes)):
        raise UserError(f"{where}: {unknown[0]} belongs to no sparsifier of this model")
    if missing := sorted(set(shapes) - set(tensors)):
        raise UserError(f"{where}: the sparsifiers need {len(missing)} tensors more, {missing[0]} among them")
    for name, shape in shapes.items():
        _check_tensor(name, tensors[name], shape, where)
    for place in (place for place in places if place.sparsifier.correction):
        inner, outer = (tensors[place.checkpoint_name(name)] for name in ("low_rank_in", "low_rank_out"))
        if inner.shape[0] != outer.shape[1]:
            raise UserError(
                f"{where}: the low-rank factors of {place.name} have ranks {inner.shape[0]} and "
                f"{outer.shape[1]}"
            )
    return {name: tensors[name] for name in shapes}


def _check_tensor(name: str, tensor: torch.Tensor, shape: Sequence[int | None], where: str) -> None:
    fits = len(shape) == tensor.ndim and all(
        size in (None, own) for size, own in zip(shape, tensor.shape, strict=True)
    )
    if not fits or not tensor.is_floating_point() or not tensor.numel():
        expected = ", ".join("rank" if size is None else str(size) for size in shape)
        raise UserError(
            f"{where}: {name} should be floating-point [{expected}], is {tensor.dtype} {list(tensor.shape)}"
        )
    if tensor.isnan().any():
        raise UserError(f"{where}: {name} holds values that are no numbers; calibrate again")


def present_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of the sparsifiers that the model has, by their names in a checkpoint."""
    selections = [(name, m) for name, m in model.named_modules() if isinstance(m, Selection)]
    return {f"{name}.{key}": b for name, m in selections for key, b in m.named_buffers(recurse=False)}


def read_tensors(files: Iterable[str | Path], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Return those of the named tensors that the safetensors files hold, on the CPU."""
    wanted, found = set(names), {}
    with torch.device("cpu"):
        for file in files if wanted else ():
            with safe_open(file, framework="pt", device="cpu") as stored:
                found |= {name: stored.get_tensor(name) for name in wanted & set(stored.keys())}
    return found
