"""A run that is killed goes on as if it had not been; what was half-written is never taken for whole."""

import copy
import json
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from families import family
from relufy.errors import UserError
from relufy.method import Relufication
from relufy.methods.sparsify import sparsify
from relufy.recipe import Finetune, Lora, Penalty
from relufy.train.checkpoints import checkpoint_folder, finish_checkpoint, last_checkpoint
from relufy.train.finetune import finetune
from relufy.train.stream import StoredWindows, WindowStream
from relufy.train.trainer import FinetuneTrainer
from together import start

SETTINGS = Finetune(
    steps=8, batch_size=4, window=8, learning_rate=3e-3, warmup_steps=2, distill=1.0, save_steps=3
)
CASES: dict[str, dict[str, Any]] = {
    "steered": {"penalty": Penalty(strength=(0.0, 1.0), until=(0.2, 1.0), target=0.8), "log_steps": 2},
    "lora": {"lora": Lora(rank=2, dropout=0.2)},
    "stream": {"distill": 0.5, "match_hidden": 1.0, "accumulate": 2},
    "muon": {"optimizer": "muon", "schedule": "wsd"},
}


def text(case: str) -> Any:
    ids = np.random.default_rng(0).integers(1, 53, (16, 8))
    if case != "stream":
        return ids
    return WindowStream((StoredWindows(ids[:9], None), StoredWindows(ids[9:, 1:], 0)), (0.6, 0.4), 8, seed=5)


def train(case: str, output: Path, resume: bool = False, **more: Any) -> tuple[Any, torch.Tensor]:
    teacher, settings = family("llama"), replace(SETTINGS, **CASES[case] | more.pop("changes", {}))
    model = sparsify(copy.deepcopy(teacher), Relufication(stage=2))
    done = finetune(model, settings, text(case), teacher=teacher, output=output, resume=resume, **more)
    return done, torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(case: str, output: Path, step: int) -> None:
    train(case, output, on_log=lambda log: die() if log["step"] >= step else None)


def die_while_saving(case: str, output: Path, step: int) -> None:
    save = FinetuneTrainer._save_rng_state
    FinetuneTrainer._save_rng_state = lambda trainer, folder: (  # type: ignore[method-assign]
        die() if trainer.state.global_step == step else save(trainer, folder)
    )
    train(case, output)


def kill(function: Any, case: str, folder: Path, step: int) -> None:
    """Run the function in a process that comes to that end."""
    process = start(function, case, folder / "out", step, folder=folder / "process")
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (folder / "out").exists()


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_goes_on_as_an_unbroken_one(case: str, tmp_path: Path) -> None:
    kill(train_and_die, case, tmp_path, step=5)
    folder = checkpoint_folder(tmp_path / "out")
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    expected, weights = train(case, tmp_path / "unbroken")
    heard: list[dict] = []
    found, again = train(case, tmp_path / "out", resume=True, on_log=heard.append)
    assert found.losses == expected.losses
    assert torch.equal(again, weights)
    assert [log["step"] for log in heard] == [log["step"] for log in expected.logs if log["step"] > 3]


def test_half_a_checkpoint_is_not_gone_on_from(tmp_path: Path) -> None:
    kill(die_while_saving, "steered", tmp_path, step=6)
    folder = checkpoint_folder(tmp_path / "out")
    assert list((folder / "unfinished" / "checkpoint-6").iterdir()), "killed in the middle"
    assert last_checkpoint(folder) == folder / "checkpoint-3"
    expected, weights = train("steered", tmp_path / "unbroken")
    found, again = train("steered", tmp_path / "out", resume=True)
    assert found.losses == expected.losses and torch.equal(again, weights)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir() and any(path.iterdir())) == [
        "checkpoint-6",
        "checkpoint-8",
    ]


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    train("lora", tmp_path / "out")
    folder = checkpoint_folder(tmp_path / "out")
    state = folder / "checkpoint-8" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    assert last_checkpoint(folder) == folder / "checkpoint-6"
    heard: list[dict] = []
    train("lora", tmp_path / "out", resume=True, on_log=heard.append)
    assert [log["step"] for log in heard] == [7, 8]
    assert last_checkpoint(folder) == folder / "checkpoint-8"


def test_a_finished_run_is_only_loaded(tmp_path: Path) -> None:
    expected, weights = train("stream", tmp_path / "out")
    heard: list[dict] = []
    found, again = train("stream", tmp_path / "out", resume=True, on_log=heard.append)
    assert (heard, found.losses) == ([], expected.losses)
    assert torch.equal(again, weights)


def test_a_full_disk_stops_the_run_and_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    train("muon", tmp_path / "measured")
    files = checkpoint_folder(tmp_path / "measured").glob("checkpoint-8/*")
    largest = max(path.stat().st_size for path in files)

    def fill(log: dict) -> None:
        if log["step"] == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, hard))

    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(UserError) as caught:
            train("muon", tmp_path / "out", on_log=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    folder = checkpoint_folder(tmp_path / "out")
    assert "the checkpoint of step 6 could not be written" in str(caught.value)
    assert str(caught.value).endswith(f"the last good checkpoint is {folder / 'checkpoint-3'}")
    assert "\n" not in str(caught.value)
    assert [path.name for path in folder.rglob("checkpoint-*")] == ["checkpoint-3"]


def test_what_changes_no_weight_may_change_in_between(tmp_path: Path) -> None:
    kill(train_and_die, "lora", tmp_path, step=4)
    changes = {"log_steps": 4, "save_steps": 2, "gradient_checkpointing": True}
    found, weights = train("lora", tmp_path / "out", resume=True, changes=changes)
    expected, unbroken = train("lora", tmp_path / "unbroken", changes={"gradient_checkpointing": True})
    assert torch.allclose(weights, unbroken, atol=1e-6)
    assert found.losses[-1] == pytest.approx(np.mean(expected.losses[4:]), rel=1e-5)
    with pytest.raises(UserError, match="a run with seed 0, not 1"):
        train("lora", tmp_path / "out", resume=True, changes={"seed": 1})
    with pytest.raises(UserError, match="a run with another text"):
        train(
            "stream",
            tmp_path / "out",
            resume=True,
            changes=CASES["lora"] | {"distill": 1.0, "match_hidden": 0.0},
        )


def test_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (8, 9, 10, 100):
        written = tmp_path / "unfinished" / f"checkpoint-{step}"
        written.mkdir(parents=True)
        (written / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        finish_checkpoint(written)
        assert last_checkpoint(tmp_path) == tmp_path / f"checkpoint-{step}"
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-100"]
