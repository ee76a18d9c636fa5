"""The recipes of trained methods: what they say is what the papers say, and every one of them makes its zeros
on gated and plain models, or refuses by name."""

from pathlib import Path

import pytest
import torch
from tests.methods.written import drawn_windows

import families
from relufy.errors import UserError
from relufy.method import FatRelu, Relufication
from relufy.methods.sparsify import sparsify
from relufy.model.checkpoint import load_model, save_checkpoint
from relufy.model.configuration import sparsity_of
from relufy.recipe import Finetune, Penalty, Recipe, load_recipe, recipe_from_mapping, shipped_recipes

IDS = torch.tensor([[3, 4, 5, 50, 7]])
TRAINED = {
    "relufy-both": ["relu", "relu", "relu"],
    "relufy-shifted": ["relu"],
    "relufy-helu": ["helu"],
    "relufy-relu2": ["relu2"],
    "relufy-drelu": ["drelu"],
    "prosparse": ["fatrelu"],
    "prosparse-7b": ["fatrelu"],
    "prosparse-13b": ["fatrelu"],
    "minicpm-1b": ["relu"],
}
"""Recipe -> the functions of the sparsifiers in the end."""
TOKENS = {
    "prosparse-7b": 34.60e9,
    "prosparse-13b": 134.22e9,
    "minicpm-1b": 466.94e9,
    "minicpm-1b-sft": 6.08e9,
}
"""What the paper's tables count in the end."""


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", TRAINED)
def test_it_makes_its_zeros_and_a_checkpoint_of_them(name: str, family: str, tmp_path: Path) -> None:
    model = families.family(family)
    if (name, family) == ("relufy-drelu", "gpt2"):
        with pytest.raises(UserError, match="drelu needs a gate, and GPT2LMHeadModel has a plain MLP"):
            sparsify(model, name)
        return
    sparsify(model, name, drawn_windows())
    assert [s.function for s in sparsity_of(model).sparsifiers] == TRAINED[name]
    save_checkpoint(model, None, tmp_path / "model")
    with torch.inference_mode():
        assert torch.equal(load_model(tmp_path / "model")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("name", TRAINED)
def test_stage_by_stage_is_the_same_as_at_once(name: str) -> None:
    at_once = sparsify(families.family("llama"), name, drawn_windows())
    model = families.family("llama")
    for stage in load_recipe(name).stages():
        sparsify(model, stage, drawn_windows())
    assert sparsity_of(model) == sparsity_of(at_once)


def test_the_instruction_stage_needs_what_comes_before_it() -> None:
    with pytest.raises(UserError, match="layer 0 makes no zeros; relufy the model first"):
        sparsify(families.family("llama"), "minicpm-1b-sft")
    model = sparsify(sparsify(families.family("llama"), "minicpm-1b"), "minicpm-1b-sft")
    assert [s.function for s in sparsity_of(model).sparsifiers] == ["fatrelu"]


@pytest.mark.parametrize("name", [*TRAINED, "minicpm-1b-sft"])
def test_it_is_described_and_survives_its_own_yaml(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and all(len(stage.description) > 40 for stage in recipe.stages())
    assert recipe_from_mapping(recipe.to_mapping(), "test") == recipe == shipped_recipes()[name]


def test_both_is_stage_1_and_then_stage_2() -> None:
    first, second = load_recipe("relufy-both").stages()
    assert (first.sparsify, first.finetune) == (Relufication(), load_recipe("relufy-stage1").finetune)
    assert second == load_recipe("relufy-stage2")


@pytest.mark.parametrize("name", ["relufy-shifted", "relufy-helu", "relufy-relu2"])
def test_swaps_are_trained_like_stage_1(name: str) -> None:
    assert load_recipe(name).finetune == load_recipe("relufy-stage1").finetune


@pytest.mark.parametrize("name", TOKENS)
def test_published_runs_see_the_published_tokens(name: str) -> None:
    settings = load_recipe(name).finetune
    assert settings.steps * settings.batch_size * settings.window == pytest.approx(TOKENS[name], rel=0.005)
    assert settings.penalty is not None and settings.penalty.until[-1] == settings.steps
    assert settings.penalty.target is None


def test_prosparse_7b_is_the_papers_table() -> None:
    settings = load_recipe("prosparse-7b").finetune
    expected = Penalty((0.0, 5e-3, 5e-2, 5e-2, 0.2, 0.2), (5000, 6000, 10000, 12000, 16000, 16500))
    assert settings.penalty == expected
    assert (settings.learning_rate, settings.schedule, settings.window) == (3e-5, "cosine", 4096)


@pytest.mark.parametrize("name", ["prosparse", "prosparse-7b", "prosparse-13b", "minicpm-1b-sft"])
def test_it_ends_with_a_threshold_and_no_training(name: str) -> None:
    last = load_recipe(name).stages()[-1]
    assert last.sparsify == FatRelu(threshold=0.01)
    assert last.finetune == Finetune(steps=0)
    assert load_recipe(name).with_finetune(steps=7).stages()[-1].finetune.steps == 0


def test_prosparse_goes_the_papers_way_to_its_target() -> None:
    """In logarithms of the density, by the authors' fit: 100 - exp(-1.76 strength ** 0.30 + 3.49) % zeros."""
    progressive, paper = (
        load_recipe("prosparse").finetune.penalty,
        load_recipe("prosparse-7b").finetune.penalty,
    )
    assert progressive is not None and paper is not None
    assert progressive.until == paper.until and progressive.target == 0.9
    way = [(strength / paper.strength[-1]) ** 0.30 for strength in paper.strength]
    assert progressive.strength == pytest.approx(way, abs=0.005)


def test_a_recipe_without_zeros_anywhere_is_refused() -> None:
    with pytest.raises(UserError, match="'control' has no 'sparsify' part"):
        sparsify(families.family("llama"), Recipe("control", then=Recipe("again")))
