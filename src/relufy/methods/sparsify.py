"""The one verb: make a model activation-sparse as a recipe says."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.errors import UserError
from relufy.methods.relufication import relufication
from relufy.model.configuration import sparsity_of
from relufy.model.provenance import base_provenance
from relufy.model.sites import find_sites
from relufy.model.sparsifiers import apply_sparsity
from relufy.model.structure import BlockSites
from relufy.recipe import METHODS, Recipe, Relufication, load_recipe

_SPARSIFIERS: dict[type, Callable[[Any, Sequence[BlockSites]], tuple[Sparsifier, ...]]] = {
    Relufication: relufication
}


def sparsify(model: PreTrainedModel, recipe: Recipe | Relufication | str | Path) -> PreTrainedModel:
    """Make the zeros that a recipe asks for, in place, without any training; return the model.

    `recipe` is a recipe, a method's parameters, the name of a shipped recipe or a YAML file. Raises UserError
    for a recipe without a method, a model of unknown shape, and zeros that this model cannot have.
    """
    chosen = _as_recipe(recipe)
    if chosen.sparsify is None:
        raise UserError(
            f"the recipe {chosen.name!r} has no 'sparsify' part, so it makes no zeros; "
            "fine-tune with it, or pick another (`relufy recipes` lists them)"
        )
    sparsifiers = _SPARSIFIERS[type(chosen.sparsify)](chosen.sparsify, find_sites(model))
    sparsity = ActivationSparsity(sparsifiers, recipe=chosen.to_mapping())
    provenance = sparsity_of(model).provenance or base_provenance(model)
    return apply_sparsity(model, replace(sparsity, provenance=provenance))


def _as_recipe(recipe: Recipe | Relufication | str | Path) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str | Path):
        return load_recipe(recipe)
    if type(recipe) in METHODS.values():
        return Recipe(name=f"{type(recipe).__name__.lower()}", sparsify=recipe)
    raise UserError(f"expected a recipe, its name or its file, found {type(recipe).__name__}")
