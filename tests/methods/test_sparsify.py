"""`sparsify` takes a recipe in any form, and relufication is what the paper says."""

from pathlib import Path

import pytest
import torch

import families
from relufy.activation_sparsity import Sparsifier
from relufy.errors import UserError
from relufy.method import Relufication
from relufy.methods.sparsify import sparsify
from relufy.model.configuration import sparsity_of
from relufy.recipe import Recipe, load_recipe, recipe_from_mapping

IDS = torch.tensor([[3, 4, 5, 50, 7]])


def test_every_form_of_a_recipe_makes_the_same_model(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(load_recipe("relufy-stage2").to_yaml())
    forms = [Relufication(stage=2), load_recipe("relufy-stage2"), "relufy-stage2", str(file), file]
    logits = [sparsify(families.family("llama"), form)(IDS).logits for form in forms]
    assert all(torch.equal(logits[0], other) for other in logits)


def test_it_works_in_place_and_returns_the_model() -> None:
    model = families.family("llama")
    assert sparsify(model, "relufy-stage1") is model


@pytest.mark.parametrize(
    ("name", "stage", "sites"),
    [
        ("llama", 1, [("neuron",)]),
        ("llama", 2, [("neuron",), ("q", "k", "v"), ("gate", "up")]),
        ("gpt2", 2, [("neuron",), ("q", "k", "v"), ("up",)]),
        ("falcon", 2, [("neuron",), ("q", "k", "v"), ("up",)]),
    ],
)
def test_relufication_sets_the_papers_sites(name: str, stage: int, sites: list[tuple[str, ...]]) -> None:
    model = sparsify(families.family(name), Relufication(stage=stage))  # type: ignore[arg-type]
    assert [sparsifier.sites for sparsifier in sparsity_of(model).sparsifiers] == sites


def test_the_shift_goes_to_the_activation_alone() -> None:
    model = sparsify(families.family("llama"), Relufication(stage=2, shift=1.0))
    assert [s.shift for s in sparsity_of(model).sparsifiers] == [1.0, 0.0, 0.0]


def test_shift_zero_is_stage_1_bit_for_bit() -> None:
    shifted = sparsify(families.family("llama"), Relufication(shift=0.0))
    assert torch.equal(shifted(IDS).logits, sparsify(families.family("llama"), "relufy-stage1")(IDS).logits)


@pytest.mark.parametrize("form", [Relufication(stage=2), "relufy-stage2"], ids=["parameters", "shipped"])
def test_the_block_keeps_the_recipe(form: Relufication | str) -> None:
    block = sparsity_of(sparsify(families.family("llama"), form))
    assert recipe_from_mapping(block.recipe, "block").sparsify == Relufication(stage=2)
    assert block.sparsifiers[0] == Sparsifier(("neuron",), "relu")


def test_a_recipe_without_a_method_is_refused() -> None:
    with pytest.raises(UserError, match="'dense-control' has no 'sparsify' part"):
        sparsify(families.family("llama"), "dense-control")
    with pytest.raises(UserError, match="has no 'sparsify' part"):
        sparsify(families.family("llama"), Recipe(name="empty"))


def test_what_is_no_recipe_is_refused() -> None:
    with pytest.raises(UserError, match="expected a recipe, its name or its file, found int"):
        sparsify(families.family("llama"), 3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="did you mean 'relufy-stage1'"):
        sparsify(families.family("llama"), "relufy-stage-1")
