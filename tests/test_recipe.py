"""Recipes are data: they round-trip, and whatever does not fit is refused at its place with a suggestion."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relufy.errors import UserError
from relufy.method import Relufication
from relufy.recipe import Finetune, Recipe, load_recipe, recipe_from_mapping, shipped_recipes

RECIPES = st.builds(
    Recipe,
    name=st.text(min_size=1),
    description=st.text(),
    sparsify=st.none()
    | st.builds(Relufication, st.sampled_from([1, 2]), st.floats(allow_nan=False, allow_infinity=False)),
    finetune=st.builds(
        Finetune,
        steps=st.integers(1, 10**6),
        window=st.integers(2, 4096),
        learning_rate=st.floats(1e-8, 1.0),
        distill=st.floats(0, 1),
        seed=st.integers(0, 2**32 - 1),
    ),
)


@given(RECIPES)
def test_what_is_written_is_read(recipe):
    assert recipe_from_mapping(recipe.to_mapping(), "test") == recipe


@given(RECIPES)
def test_yaml_keeps_it_too(recipe):
    import yaml

    assert recipe_from_mapping(yaml.safe_load(recipe.to_yaml()), "test") == recipe


def test_shipped_recipes_have_their_files_names():
    shipped = shipped_recipes()
    assert {"relufy-stage1", "relufy-stage2", "dense-control", "demo-stage1", "demo-stage2"} <= set(shipped)
    assert all(load_recipe(name) == recipe for name, recipe in shipped.items())
    assert shipped["relufy-stage2"].sparsify == Relufication(stage=2)
    assert shipped["dense-control"].sparsify is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "expected a mapping"),
        ({}, "'name' is missing"),
        ({"name": "x", "finetun": {}}, r"unknown key 'finetun' \(did you mean 'finetune'\?\)"),
        ({"name": "x", "finetune": {"stepps": 1}}, r"x\.finetune: unknown key 'stepps'.*'steps'"),
        ({"name": "x", "finetune": {"steps": "many"}}, r"finetune\.steps: expected int, found str 'many'"),
        ({"name": "x", "finetune": {"steps": True}}, r"finetune\.steps: expected int, found bool"),
        ({"name": "x", "finetune": {"steps": -1}}, "steps must not be negative"),
        ({"name": "x", "finetune": {"distill": 2}}, "between 0 and 1"),
        ({"name": "x", "version": 7}, "version 7"),
        ({"name": "x", "sparsify": "stage1"}, "a mapping with a method"),
        ({"name": "x", "sparsify": {"stage": 1}}, "unknown method None"),
        ({"name": "x", "sparsify": {"method": "relufcation"}}, "did you mean 'relufication'"),
        ({"name": "x", "sparsify": {"method": "relufication", "stage": 3}}, "one of 1, 2"),
        ({"name": "x", "sparsify": {"method": "relufication", "shft": 1}}, "did you mean 'shift'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(data, message):
    with pytest.raises(UserError, match=message):
        recipe_from_mapping(data, "x")


def test_a_file_is_named_in_its_errors(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: [unclosed")
    with pytest.raises(UserError, match=r"mine\.yaml: not valid YAML"):
        load_recipe(file)
    with pytest.raises(UserError, match=r"no recipe file .*other\.yaml"):
        load_recipe(tmp_path / "other.yaml")
    with pytest.raises(UserError, match="did you mean 'relufy-stage1'"):
        load_recipe("relufy-stage-1")


def test_values_are_set_by_their_place():
    recipe = load_recipe("relufy-stage1").with_values(
        ["finetune.distill=0.5", "sparsify.shift=0.1", "name=mine"]
    )
    assert recipe.finetune.distill == 0.5 and recipe.name == "mine"
    assert recipe.sparsify == Relufication(stage=1, shift=0.1)
    assert recipe.finetune.steps == load_recipe("relufy-stage1").finetune.steps


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("finetune.distil=1", "did you mean 'distill'"),
        ("finetune.steps=many", "expected int"),
        ("finetune.steps", "KEY=VALUE"),
        ("fine.steps=1", "has no 'fine'"),
        ("name.first=1", "has no 'name'"),
    ],
)
def test_a_value_out_of_place_is_refused(assignment, message):
    with pytest.raises(UserError, match=message):
        load_recipe("relufy-stage1").with_values([assignment])
