"""A recipe and what follows it: stage after stage, each whole or not there, resumed where it stopped."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_checkpoints import die

from families import family
from relufy.cli.quiet import quiet_libraries
from relufy.errors import UserError
from relufy.method import FatRelu, Relufication
from relufy.model.checkpoint import load_model
from relufy.model.configuration import sparsity_of
from relufy.processes import join_processes, leave_processes
from relufy.recipe import Calibration, Finetune, Penalty, Recipe
from relufy.train.checkpoints import checkpoint_folder
from relufy.train.run import Run, run_recipe, stages_folder
from together import run_together, start

FINETUNE = Finetune(
    steps=5, batch_size=4, window=8, learning_rate=3e-3, warmup_steps=1, distill=1.0, save_steps=2
)
SECOND = Recipe(
    "second", sparsify=Relufication(stage=2), finetune=replace(FINETUNE, steps=4, penalty=Penalty())
)
PAPER = Recipe("first", sparsify=Relufication(stage=1), finetune=FINETUNE, then=SECOND)
SHIFT = Recipe(
    "shift",
    sparsify=FatRelu(sparsity=0.8),
    calibrate=Calibration(tokens=640, window=8),
    finetune=Finetune(steps=0),
)
PROSPARSE = replace(PAPER, then=SHIFT)


def run(recipe: Recipe, output: Path, **more: Any) -> tuple[list, torch.Tensor]:
    text = np.random.default_rng(0).integers(1, 53, (80, 8))
    settings = Run(output, None, lambda finetune: text, teacher=family("llama"), **more)
    done = run_recipe(family("llama"), recipe, settings)
    return done, weights_of(output)


def weights_of(folder: Path) -> torch.Tensor:
    return torch.cat([parameter.detach().float().flatten() for parameter in load_model(folder).parameters()])


def run_and_die(recipe: Recipe, output: Path, stage: str, step: int) -> None:
    def on_log(running: Recipe, log: dict) -> None:
        if running.name == stage and log["step"] == step:
            die()

    run(recipe, output, on_log=on_log)


def test_both_stages_are_trained_and_the_last_is_saved(tmp_path: Path) -> None:
    heard: list[tuple[str, int]] = []
    done, _ = run(PAPER, tmp_path / "out", on_log=lambda stage, log: heard.append((stage.name, log["step"])))
    assert heard == [("first", step) for step in range(1, 6)] + [("second", step) for step in range(1, 5)]
    assert [result.steps for result in done] == [5, 4]
    sparsity = sparsity_of(load_model(tmp_path / "out"))
    assert {site for sparsifier in sparsity.sparsifiers for site in sparsifier.sites} >= {"q", "up", "neuron"}
    assert sparsity.provenance["training_tokens"] == 9 * 4 * 7
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("stage", "step", "steps"), [("first", 3, [5, 4]), ("second", 3, [4])])
def test_a_killed_chain_goes_on_in_its_stage(tmp_path: Path, stage: str, step: int, steps: list[int]) -> None:
    output = tmp_path / "out"
    process = start(run_and_die, PAPER, output, stage, step, folder=tmp_path / "process")
    process.join(60)
    assert process.exitcode == -9 and not output.exists()
    with pytest.raises(UserError, match="holds stages of an interrupted run"):
        run(PAPER, output)
    expected, weights = run(PAPER, tmp_path / "unbroken")
    heard: list[tuple[str, int]] = []
    found, again = run(
        PAPER, output, resume=True, on_log=lambda stage, log: heard.append((stage.name, log["step"]))
    )
    assert heard[0] == (stage, 3)
    assert [result.steps for result in found] == steps
    assert [result.losses for result in found] == [result.losses for result in expected[-len(steps) :]]
    assert torch.equal(again, weights)
    assert not stages_folder(output).exists() and not checkpoint_folder(output).exists()


def test_a_stage_may_train_nothing(tmp_path: Path) -> None:
    done, weights = run(PROSPARSE, tmp_path / "out")
    assert [result.steps for result in done] == [5, 0]
    _, alone = run(replace(PAPER, then=None), tmp_path / "first")
    assert torch.equal(weights, alone)
    sparsifiers = sparsity_of(load_model(tmp_path / "out")).sparsifiers
    assert {sparsifier.function for sparsifier in sparsifiers} == {"fatrelu"}


def test_only_the_last_stage_is_saved_in_another_type(tmp_path: Path) -> None:
    run(PAPER, tmp_path / "exact")
    run(PAPER, tmp_path / "out", dtype=torch.bfloat16)
    expected = weights_of(tmp_path / "exact").bfloat16().float()
    assert torch.equal(weights_of(tmp_path / "out"), expected)
    assert load_model(tmp_path / "out").config.dtype == torch.float32  # as it was asked to be loaded
    assert '"dtype": "bfloat16"' in (tmp_path / "out" / "config.json").read_text()


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    for recipe in (PAPER, replace(PAPER, then=None)):
        with pytest.raises(UserError, match="no checkpoint to resume from"):
            run(recipe, tmp_path / "out", resume=True)


def run_in_each(folder: Path) -> list:
    quiet_libraries()
    join_processes()
    sharded, _ = run(PAPER, folder / "sharded", shard=True, dtype=torch.bfloat16)
    whole, _ = run(PROSPARSE, folder / "whole")
    leave_processes()
    return [[result.losses for result in done] for done in (sharded, whole)]


def test_two_processes_go_through_the_stages(tmp_path: Path) -> None:
    found, other = run_together(run_in_each, tmp_path / "both", folder=tmp_path)
    assert found == other
    for name, recipe, losses in zip(("sharded", "whole"), (PAPER, PROSPARSE), found, strict=True):
        expected, weights = run(recipe, tmp_path / "alone" / name)
        for one, two in zip(expected, losses, strict=True):
            assert two == pytest.approx(one.losses, rel=2e-4)
        saved = weights_of(tmp_path / "both" / name)
        begun = torch.cat([parameter.detach().flatten() for parameter in family("llama").parameters()])
        tolerance = 0.1 if name == "sharded" else 1e-2
        assert (saved - weights).norm() < tolerance * (weights - begun).norm()
    assert '"dtype": "bfloat16"' in (tmp_path / "both" / "sharded" / "config.json").read_text()
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["sharded", "whole"]
