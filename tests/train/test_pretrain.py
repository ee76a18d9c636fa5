"""Pretraining: a new model learns its text, repeats exactly, and goes on only as what it was."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from families import FAMILIES
from relufy.errors import UserError
from relufy.recipe import Finetune, Lora, Penalty
from relufy.train.checkpoints import checkpoint_folder
from relufy.train.pretrain import PRETRAINING, pretrain

TINY = Finetune(steps=6, batch_size=4, window=8, learning_rate=1e-2, warmup_steps=1, save_steps=2)
WINDOWS = np.random.default_rng(0).integers(0, 53, (16, 8))


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("activation", ["relu", "beta-silu:8", "drelu"])
def test_a_new_model_learns_its_text(activation: str, optimizer: str) -> None:
    settings = replace(TINY, steps=30, optimizer=optimizer, log_steps=5)  # type: ignore[arg-type]
    model, done = pretrain(FAMILIES["llama"](), settings, WINDOWS, activation=activation)
    assert done.losses[0] == pytest.approx(np.log(53), rel=0.1)
    assert done.losses[-1] < 0.8 * done.losses[0]
    assert not model.training and model.dtype == torch.float32


def test_the_same_seed_gives_the_same_model() -> None:
    one, _ = pretrain(FAMILIES["llama"](), TINY, WINDOWS)
    same, _ = pretrain(FAMILIES["llama"](), TINY, WINDOWS)
    other, _ = pretrain(FAMILIES["llama"](), replace(TINY, seed=1), WINDOWS)
    assert torch.equal(weights(one), weights(same)) and not torch.equal(weights(one), weights(other))


class Interrupted(Exception):
    pass


def interrupted(output: Path, settings: Finetune, activation: str) -> None:
    """Begin a run and leave it after three steps, with a checkpoint of the second."""

    def stop(log: dict) -> None:
        if log["step"] == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        pretrain(FAMILIES["llama"](), settings, WINDOWS, activation=activation, output=output, on_log=stop)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_an_unbroken_run(optimizer: str, tmp_path: Path) -> None:
    settings = replace(TINY, optimizer=optimizer, schedule="wsd")  # type: ignore[arg-type]
    interrupted(tmp_path / "model", settings, "relu")
    whole, unbroken = pretrain(FAMILIES["llama"](), settings, WINDOWS, activation="relu")
    resumed, done = pretrain(
        FAMILIES["llama"](), settings, WINDOWS, activation="relu", output=tmp_path / "model", resume=True
    )
    assert done.losses == unbroken.losses and torch.equal(weights(resumed), weights(whole))


def test_a_run_is_resumed_as_the_same_model_or_not_at_all(tmp_path: Path) -> None:
    interrupted(tmp_path / "model", TINY, "relu")
    assert checkpoint_folder(tmp_path / "model").is_dir()
    for activation in ("gelu", "helu"):
        with pytest.raises(UserError, match="holds a model with"):
            pretrain(
                FAMILIES["llama"](),
                TINY,
                WINDOWS,
                activation=activation,
                output=tmp_path / "model",
                resume=True,
            )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill": 1.0}, "no dense original"),
        ({"match_hidden": 1.0}, "no dense original"),
        ({"lora": Lora()}, "leave it out for a new model"),
        ({"penalty": Penalty(target=0.9)}, "silu makes no exact zeros"),
        ({"window": 4096}, "longer than the 2048"),
    ],
)
def test_refusals(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pretrain(FAMILIES["llama"](), replace(TINY, **changes), WINDOWS)


def test_a_penalty_makes_zeros_from_the_start() -> None:
    settings = replace(TINY, steps=30, learning_rate=3e-3)
    penalty = Penalty(strength=(3.0,), until=(1.0,))
    _, free = pretrain(FAMILIES["llama"](), settings, WINDOWS, activation="relu")
    _, pressed = pretrain(FAMILIES["llama"](), replace(settings, penalty=penalty), WINDOWS, activation="relu")
    sparsity = [np.mean(done.logs[-1]["sparsity"]["neuron"]) for done in (free, pressed)]
    assert sparsity[1] > sparsity[0] + 0.05


def test_the_defaults_fit_the_smallest_shape() -> None:
    assert PRETRAINING.window <= 512 and PRETRAINING.tokens < 1_000_000
