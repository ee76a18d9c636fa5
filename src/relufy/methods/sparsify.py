"""The one verb: make a model activation-sparse as a recipe says."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.errors import UserError
from relufy.measure.quality import evaluating
from relufy.method import METHODS, Auto, Relufication, Selecting, method_name
from relufy.methods.setting import Found, Progress, Setting, no_progress
from relufy.model.configuration import refuse_quantized, sparsity_of
from relufy.model.fingerprints import with_fingerprints
from relufy.model.places import find_places
from relufy.model.provenance import base_provenance
from relufy.model.sites import find_sites
from relufy.model.sparsifiers import apply_sparsity
from relufy.recipe import Recipe, load_recipe
from relufy.text import check_windows, draw_windows


def sparsify(
    model: PreTrainedModel,
    recipe: "Recipe | Relufication | Selecting | str | Path",
    windows: np.ndarray | None = None,
    progress: Progress = no_progress,
    on_note: Callable[[str], object] = lambda _note: None,
) -> PreTrainedModel:
    """Make the zeros that a recipe asks for, in place, without any training; return the model.

    `recipe` is a recipe, a method's parameters, the name of a shipped recipe or a YAML file; the zeros of the
    recipes that follow it are made too, in their order. `windows`, int64 `[windows, length]` as
    `relufy.text.read_windows` returns them, are what a method is calibrated on; as many are drawn as the
    recipe says; `on_note` gets what was measured on them, in a line each. Raises UserError for a recipe
    without a method, missing text, a model of unknown shape or with masks already, and zeros that this model
    cannot have.
    """
    for stage in stages_with_zeros(as_recipe(recipe)):
        setting = make_setting(model, stage, windows, progress)
        found = find(stage.sparsify, setting)
        install(setting, stage, found)
        for note in found.notes:
            on_note(note)
    return model


def stages_with_zeros(recipe: Recipe) -> list[Recipe]:
    """Return those of a recipe's stages that make zeros. Raises UserError if there is none."""
    stages = [stage for stage in recipe.stages() if stage.sparsify is not None]
    if not stages:
        raise UserError(
            f"the recipe {recipe.name!r} has no 'sparsify' part, so it makes no zeros; "
            "fine-tune with it, or pick another (`relufy recipes` lists them)"
        )
    return stages


def make_setting(
    model: PreTrainedModel, recipe: Recipe, windows: np.ndarray | None, progress: Progress = no_progress
) -> Setting:
    """Return what the recipe's method works with. Raises UserError if the model or the text is unfit."""
    refuse_quantized(model.config.to_dict(), type(model).__name__)
    if isinstance(recipe.sparsify, Selecting | Auto):
        _refuse_masks(model)
    if windows is not None:
        check_windows(windows, model.config.vocab_size)
        count = max(1, recipe.calibrate.tokens // windows.shape[1])
        windows = draw_windows(windows, count, recipe.calibrate.seed)
        _refuse_nan(model, windows[:1])
    return Setting(model, find_sites(model), windows, recipe.calibrate, progress)


def find(method: Any, setting: Setting) -> Found:
    """Return what a method finds for a model; the model stays as it is. The type of `method` decides.

    The method of a name is the function of that name in the module of that name.
    """
    name = method_name(method)
    function: Callable[[Any, Setting], Found] = getattr(import_module(f"relufy.methods.{name}"), name)
    found = function(method, setting)
    if not isinstance(method, Selecting):
        return found
    return replace(found, sparsifiers=tuple(_with_phase(method, s) for s in found.sparsifiers))


def install(setting: Setting, recipe: Recipe, found: Found) -> PreTrainedModel:
    """Put what a method found on the model, and return it. Masks leave it its activations with zeros."""
    present = sparsity_of(setting.model)
    leaves = isinstance(recipe.sparsify, Selecting | Auto)
    kept = kept_activations(present.sparsifiers, found.sparsifiers) if leaves else []
    sparsity = ActivationSparsity((*kept, *found.sparsifiers), recipe=recipe.to_mapping())
    provenance = present.provenance or base_provenance(setting.model)
    if setting.windows is not None and recipe.sparsify.needs_text:
        provenance = provenance | {"calibration_tokens": int(setting.windows.size)}
    places = find_places(setting.blocks, sparsity)
    provenance = with_fingerprints(provenance, places)
    tensors = {place.checkpoint_name(n): t for place in places for n, t in found.tensors_at(place).items()}
    return apply_sparsity(setting.model, replace(sparsity, provenance=provenance), tensors)


def as_recipe(recipe: "Recipe | Relufication | Selecting | str | Path") -> Recipe:
    """Return the recipe that is meant. Raises UserError."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str | Path):
        return load_recipe(recipe)
    if type(recipe) in METHODS.values():
        return Recipe(name=method_name(recipe), sparsify=recipe)
    raise UserError(f"expected a recipe, its name or its file, found {type(recipe).__name__}")


def _refuse_nan(model: PreTrainedModel, window: np.ndarray) -> None:
    """Raise UserError if the model's logits for a window, int64 `[1, length]`, are no finite numbers."""
    with evaluating(model):
        logits = model(input_ids=torch.from_numpy(window).to(model.device), use_cache=False).logits
    if not logits.isfinite().all():
        raise UserError(
            "the model's logits hold NaN or infinity, so there is nothing to calibrate on; check the "
            "checkpoint, or load it in float32"
        )


def _refuse_masks(model: PreTrainedModel) -> None:
    for sparsifier in sparsity_of(model).sparsifiers:
        if sparsifier.is_selection:
            raise UserError(
                f"the model has masks already ({sparsifier.function} at {' '.join(sparsifier.sites)}); start "
                "from the model that they were calibrated on"
            )


def _with_phase(method: Selecting, sparsifier: Sparsifier) -> Sparsifier:
    if not sparsifier.is_selection:
        return sparsifier
    return replace(sparsifier, phase=method.phase, dense_first_tokens=method.dense_first_tokens)


def kept_activations(present: Sequence[Sparsifier], found: Sequence[Sparsifier]) -> list[Sparsifier]:
    """Return the activations that the model has where nothing new was found."""
    taken = {site for sparsifier in found for site in sparsifier.sites}
    return [s for s in present if not taken & set(s.sites)]
