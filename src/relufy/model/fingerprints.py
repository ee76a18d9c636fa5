"""Weights that sparsifiers' tensors were derived from: recorded when calibrated, checked when loaded and
saved."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from relufy.errors import UserError
from relufy.fingerprint import (
    DERIVED_FROM,
    fingerprint_of,
    recorded,
    refuse_missing_weight,
    refuse_other_weight,
    sampled,
)
from relufy.model.configuration import sparsity_of
from relufy.model.places import Place
from relufy.model.structure import Projection

DERIVED = ("weight", "low_rank_in")
"""The tensors that are made of a projection's weight: its column norms, its factors."""


def with_fingerprints(
    provenance: Mapping[str, Any], places: Sequence[Place], others: Sequence[Projection] = ()
) -> dict[str, Any]:
    """Return a provenance that records the weights that tensors at these places were derived from, those of
    the `others` (what predictors predict), and no more."""
    found = {f"{projection.name}.weight": _of_projection(projection) for projection in others}
    for place in places:
        if any(name in place.tensors() for name in DERIVED):
            for projection in place.served().values():
                found[f"{projection.name}.weight"] = _of_projection(projection)
    rest = {key: value for key, value in provenance.items() if key != DERIVED_FROM}
    return rest | {DERIVED_FROM: found} if found else rest


def _of_projection(projection: Projection) -> str:
    weight: torch.Tensor = projection.module.weight  # type: ignore[assignment]
    return fingerprint_of_tensor(weight)


def fingerprint_of_tensor(weight: torch.Tensor) -> str:
    """Return the fingerprint of a weight on any device, in any floating-point type."""
    places = torch.from_numpy(sampled(weight.numel())).to(weight.device)
    samples = weight.detach().reshape(-1)[places].float().cpu().numpy()
    return fingerprint_of(tuple(weight.shape), samples)


def check_model(model: nn.Module) -> None:
    """Raise UserError if a weight that a model's tensors were derived from has changed."""
    parameters = dict(model.named_parameters())
    for name, expected in recorded(sparsity_of(model).provenance).items():
        if name not in parameters:
            refuse_missing_weight(type(model).__name__, name)
        found = fingerprint_of_tensor(parameters[name])
        refuse_other_weight(type(model).__name__, name, expected, found)


def check_files(model: nn.Module, files: Iterable[str | Path]) -> None:
    """Raise UserError if safetensors files hold a weight that is not what tensors were derived from."""
    expected = recorded(sparsity_of(model).provenance)
    left = set(expected)
    for file in files if expected else ():
        with torch.device("cpu"), safe_open(file, framework="pt", device="cpu") as stored:
            for name in sorted(left & set(stored.keys())):
                found = fingerprint_of_tensor(stored.get_tensor(name))
                refuse_other_weight("the checkpoint", name, expected[name], found)
                left.remove(name)
    if left:
        refuse_missing_weight("the checkpoint", min(left))


def refuse_training(model: nn.Module) -> None:
    """Raise UserError if training would change weights that sparsifiers' tensors were derived from."""
    if derived := recorded(sparsity_of(model).provenance):
        raise UserError(
            f"the sparsifiers have tensors that were derived from {len(derived)} of the weights, which "
            "training would change; fine-tune the model first, then make it sparse"
        )
