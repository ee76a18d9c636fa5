"""Recovering a model after its zeros were made: seeded, checkpointed, resumable."""

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from relufy.errors import UserError
from relufy.files import replacing
from relufy.measure.quality import refuse_other_vocabulary
from relufy.model.fingerprints import refuse_training
from relufy.recipe import Finetune
from relufy.text import check_windows
from relufy.train.trainer import FinetuneTrainer, OnLog

RUN_FILE = "run.json"
"""What a run's checkpoints belong to: its settings and a hash of its text."""


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tune took. `seconds` are those of this call; all else is of the whole run."""

    steps: int
    tokens: int
    """Predicted tokens; `epochs` times as many as the text has."""
    epochs: float
    seconds: float
    logs: tuple[dict[str, Any], ...]
    """One per step, as `on_log` got them."""

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(log["loss"] for log in self.logs)


def finetune(
    model: PreTrainedModel,
    settings: Finetune,
    windows: np.ndarray,
    *,
    teacher: PreTrainedModel | None = None,
    output: Path | None = None,
    resume: bool = False,
    on_log: OnLog | None = None,
) -> FinetuneResult:
    """Fine-tune the model in place on windows, int64 `[windows, settings.window]`; return what it took.

    Each epoch is another shuffle of the windows; text that runs out begins anew. `teacher` is the dense
    original, needed for distillation. With an `output`, checkpoints go to `checkpoint_folder(output)`, and
    `resume` goes on from the last one with the same losses as an unbroken run; they are left there for the
    caller to remove (`remove_checkpoints`) once the model is saved. Seeds the global random state. Raises
    UserError.
    """
    _refuse_unfit(model, settings, windows, teacher)
    chosen = windows[window_order(len(windows), settings.steps * settings.batch_size, settings.seed)]
    with _run_folder(output, settings, windows, resume) as (folder, checkpoint):
        trainer = FinetuneTrainer(
            model,
            settings,
            chosen,
            folder,
            teacher=teacher if settings.needs_teacher else None,
            saves=output is not None,
            on_log=on_log,
        )
        started, was_training = time.monotonic(), model.training
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except UserError as error:
            last = output and last_checkpoint(checkpoint_folder(output))
            raise UserError(f"{error}; the last good checkpoint is {last}" if last else str(error)) from None
        finally:
            model.zero_grad()
            model.train(was_training)
    return FinetuneResult(
        steps=settings.steps,
        tokens=settings.steps * settings.batch_size * (settings.window - 1),
        epochs=len(chosen) / len(windows),
        seconds=time.monotonic() - started,
        logs=tuple(trainer.state.log_history),
    )


def window_order(num_windows: int, count: int, seed: int) -> np.ndarray:
    """Return `count` indices of windows: one seeded shuffle after the other, so that epochs are complete."""
    epochs = -(-count // num_windows)
    shuffles = [np.random.default_rng([seed, epoch]).permutation(num_windows) for epoch in range(epochs)]
    return np.concatenate(shuffles)[:count]


def checkpoint_folder(output: Path) -> Path:
    """Return where a run's checkpoints lie: beside `output`, so that `output` itself is whole or absent."""
    return output.with_name(f"{output.name}.checkpoints")


def remove_checkpoints(output: Path) -> None:
    """Remove the checkpoints of a finished run towards `output`, if there are any."""
    shutil.rmtree(checkpoint_folder(output), ignore_errors=True)


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None. (The Trainer writes its state last.)"""
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _refuse_unfit(
    model: PreTrainedModel, settings: Finetune, windows: np.ndarray, teacher: PreTrainedModel | None
) -> None:
    refuse_training(model)
    check_windows(windows, model.config.vocab_size)
    if windows.shape[1] != settings.window:
        raise UserError(f"the recipe asks for windows of {settings.window} tokens, found {windows.shape[1]}")
    if not settings.needs_teacher:
        return
    if teacher is None:
        raise UserError(
            "distill and match_hidden need the dense original as teacher; give it, or set both to 0"
        )
    if teacher is model:
        raise UserError("the teacher is the very model to be trained; load the dense original a second time")
    refuse_other_vocabulary(teacher, model)


@contextmanager
def _run_folder(
    output: Path | None, settings: Finetune, windows: np.ndarray, resume: bool
) -> Iterator[tuple[Path, Path | None]]:
    """Give the Trainer's folder and the checkpoint to resume from."""
    if output is None:
        if resume:
            raise UserError("there is nothing to resume without an output folder")
        with TemporaryDirectory(prefix="relufy-") as folder:
            yield Path(folder), None
        return
    folder = checkpoint_folder(Path(output))
    run = dataclasses.asdict(settings) | {"text": hashlib.sha256(windows.tobytes()).hexdigest()}
    if resume:
        _refuse_other_run(folder, run)
    elif last_checkpoint(folder) is not None:
        raise UserError(f"{folder} holds checkpoints of an unfinished run; resume it, or remove the folder")
    else:
        with replacing(folder / RUN_FILE) as temporary:
            temporary.write_text(json.dumps(run, indent=2) + "\n")
    yield folder, last_checkpoint(folder)


def _refuse_other_run(folder: Path, run: dict[str, Any]) -> None:
    if last_checkpoint(folder) is None or not (folder / RUN_FILE).is_file():
        raise UserError(f"there is no checkpoint to resume from in {folder}; start the run without resuming")
    recorded = json.loads((folder / RUN_FILE).read_text())
    for key in run:
        if run[key] != recorded.get(key):
            raise UserError(
                f"{folder} holds a run with {key} {recorded.get(key)!r}, not {run[key]!r}; resume with that"
            )
