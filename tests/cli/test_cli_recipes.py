"""`relufy recipes`."""

import pytest
import yaml

from relufy.cli.main import run
from relufy.recipe import load_recipe, recipe_from_mapping, shipped_recipes


def test_lists_what_ships(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in shipped_recipes())


def test_printed_yaml_is_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes", "relufy-stage2"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert recipe_from_mapping(printed, "stdout") == load_recipe("relufy-stage2")
