"""Fine-tuning: it recovers the dense model, it repeats exactly, and it can be interrupted."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from families import family
from relufy.errors import UserError
from relufy.measure.quality import fidelity, perplexity
from relufy.method import Relufication
from relufy.methods.sparsify import sparsify
from relufy.recipe import Finetune
from relufy.train.finetune import (
    checkpoint_folder,
    finetune,
    last_checkpoint,
    remove_checkpoints,
    window_order,
)

SHORT = Finetune(
    steps=6, batch_size=4, window=8, learning_rate=3e-3, warmup_steps=2, distill=1.0, save_steps=2
)


@pytest.fixture
def teacher():
    return family("llama")


def relufied(teacher, stage: int = 1):
    return sparsify(copy.deepcopy(teacher), Relufication(stage=stage))


def windows_of(count: int = 16, length: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 53, (count, length))


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def with_changes(settings: Finetune, **changes) -> Finetune:
    return Finetune(**{**settings.__dict__, **changes})


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("match_hidden", [0.0, 3.0])
def test_distillation_brings_the_model_back_to_the_dense_one(
    teacher, stage: int, match_hidden: float
) -> None:
    model, before = relufied(teacher, stage), weights(teacher)
    opened = fidelity(teacher, model, windows_of()).kl
    settings = with_changes(SHORT, steps=40, learning_rate=1e-2, match_hidden=match_hidden)
    result = finetune(model, settings, windows_of(), teacher=teacher)
    assert fidelity(teacher, model, windows_of()).kl < 0.7 * opened
    assert torch.equal(weights(teacher), before), "the teacher is not trained"
    assert result.losses[-1] < result.losses[0]


def test_cross_entropy_needs_no_teacher_and_learns_the_text(teacher) -> None:
    model, windows = relufied(teacher), windows_of(4)
    before = perplexity(model, windows).perplexity
    finetune(model, with_changes(SHORT, steps=30, distill=0.0, learning_rate=1e-2), windows)
    assert perplexity(model, windows).perplexity < 0.5 * before


def test_the_logs_say_what_happened(teacher) -> None:
    seen: list[dict] = []
    model = relufied(teacher)
    opened = fidelity(teacher, model, windows_of()[window_order(16, 4, 0)]).kl
    result = finetune(model, SHORT, windows_of(), teacher=teacher, on_log=seen.append)
    assert seen == list(result.logs) and [log["step"] for log in seen] == [1, 2, 3, 4, 5, 6]
    assert seen[0]["loss"] == seen[0]["kl"] == pytest.approx(opened, rel=1e-4)
    rates = [log["learning_rate"] / SHORT.learning_rate for log in seen]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.75, 0.5, 0.25])
    assert [log["tokens"] for log in seen] == [28 * step for step in range(1, 7)]
    assert all(log["tokens_per_second"] > 0 for log in seen)
    assert (result.steps, result.tokens, result.epochs) == (6, 6 * 28, 1.5)


def test_nothing_is_printed_and_nothing_is_left_behind(
    teacher, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = relufied(teacher)
    finetune(model, SHORT, windows_of(), teacher=teacher)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert not list(tmp_path.iterdir())
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


def test_the_same_seed_gives_the_same_model(teacher) -> None:
    one, two, other = relufied(teacher), relufied(teacher), relufied(teacher)
    first = finetune(one, SHORT, windows_of(), teacher=teacher)
    torch.rand(7)
    second = finetune(two, SHORT, windows_of(), teacher=teacher)
    third = finetune(other, with_changes(SHORT, seed=1), windows_of(), teacher=teacher)
    assert first.losses == second.losses and torch.equal(weights(one), weights(two))
    assert first.losses != third.losses


@pytest.mark.parametrize("distill", [0.0, 0.5, 1.0])
def test_accumulation_changes_memory_not_the_result(teacher, distill: float) -> None:
    settings = with_changes(SHORT, distill=distill, match_hidden=2.0)
    whole, parts = relufied(teacher), relufied(teacher)
    first = finetune(whole, settings, windows_of(), teacher=teacher)
    second = finetune(parts, with_changes(settings, accumulate=4), windows_of(), teacher=teacher)
    assert second.losses == pytest.approx(first.losses, rel=1e-4)
    assert [log["mismatch"] for log in second.logs] == pytest.approx(
        [log["mismatch"] for log in first.logs], rel=1e-4
    )
    assert (weights(whole) - weights(parts)).norm() < 0.02 * (weights(whole) - weights(teacher)).norm()


class Interruption(Exception):
    pass


def interrupt_at(step: int):
    def on_log(log: dict) -> None:
        if log["step"] == step:
            raise Interruption

    return on_log


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_is_an_unbroken_run(teacher, tmp_path: Path, accumulate: int) -> None:
    settings = with_changes(SHORT, accumulate=accumulate)
    unbroken, resumed = relufied(teacher, stage=2), relufied(teacher, stage=2)
    expected = finetune(unbroken, settings, windows_of(), teacher=teacher)
    with pytest.raises(Interruption):
        finetune(
            resumed, settings, windows_of(), teacher=teacher, output=tmp_path / "out", on_log=interrupt_at(5)
        )
    assert not (tmp_path / "out").exists()
    seen: list[dict] = []
    fresh = relufied(teacher, stage=2)
    found = finetune(
        fresh,
        settings,
        windows_of(),
        teacher=teacher,
        output=tmp_path / "out",
        resume=True,
        on_log=seen.append,
    )
    assert [log["step"] for log in seen] == [5, 6]
    assert found.losses == expected.losses
    assert torch.equal(weights(fresh), weights(unbroken))
    remove_checkpoints(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_without_its_state_does_not_count(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").touch()
    (tmp_path / "checkpoint-11").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_only_the_very_same_run_is_resumed(teacher, tmp_path: Path) -> None:
    def run(settings: Finetune = SHORT, windows: np.ndarray | None = None, resume: bool = False) -> None:
        text = windows_of() if windows is None else windows
        finetune(relufied(teacher), settings, text, teacher=teacher, output=tmp_path / "out", resume=resume)

    with pytest.raises(UserError, match="no checkpoint to resume from"):
        run(resume=True)
    run()
    with pytest.raises(UserError, match="holds checkpoints of an unfinished run"):
        run()
    with pytest.raises(UserError, match=r"a run with learning_rate 0\.003, not 0\.1"):
        run(with_changes(SHORT, learning_rate=0.1), resume=True)
    with pytest.raises(UserError, match="a run with text"):
        run(windows=windows_of()[::-1].copy(), resume=True)
    run(resume=True)


def test_divergence_stops_before_the_model_is_ruined(teacher, tmp_path: Path) -> None:
    model, kept = relufied(teacher), {}

    def poison(log: dict) -> None:
        if log["step"] == 4:
            kept["weights"] = weights(model).clone()
            with torch.no_grad():
                teacher.lm_head.weight[0] = float("nan")

    with pytest.raises(UserError, match=r"diverged at step 5 .*lower learning_rate.*checkpoint-4"):
        finetune(model, SHORT, windows_of(), teacher=teacher, output=tmp_path / "out", on_log=poison)
    assert torch.equal(weights(model), kept["weights"]) and torch.isfinite(weights(model)).all()
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())
    last = last_checkpoint(checkpoint_folder(tmp_path / "out"))
    assert last is not None and json.loads((last / "trainer_state.json").read_text())["global_step"] == 4


def test_text_that_runs_out_begins_anew_in_another_order() -> None:
    order = window_order(5, 13, seed=3)
    assert len(order) == 13
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5))
    assert list(order[:5]) != list(order[5:10])
    assert np.array_equal(order, window_order(5, 20, seed=3)[:13])
    assert not np.array_equal(order, window_order(5, 13, seed=4))


@pytest.mark.parametrize(
    ("settings", "windows", "message"),
    [
        (SHORT, windows_of(0), "at least one window"),
        (SHORT, windows_of(length=9), "windows of 8 tokens, found 9"),
        (SHORT, windows_of() + 53, "vocabulary of 53"),
    ],
    ids=["empty", "another length", "another tokenizer"],
)
def test_unfit_windows_are_refused(teacher, settings: Finetune, windows: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        finetune(relufied(teacher), settings, windows, teacher=teacher)


def test_an_unfit_teacher_is_refused(teacher) -> None:
    model = relufied(teacher)
    with pytest.raises(UserError, match="need the dense original"):
        finetune(model, SHORT, windows_of())
    with pytest.raises(UserError, match="need the dense original"):
        finetune(model, with_changes(SHORT, distill=0.0, match_hidden=1.0), windows_of())
    with pytest.raises(UserError, match="the very model to be trained"):
        finetune(model, SHORT, windows_of(), teacher=model)
    with pytest.raises(UserError, match="without an output folder"):
        finetune(model, SHORT, windows_of(), teacher=teacher, resume=True)
