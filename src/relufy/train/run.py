"""A whole recipe on a model: the zeros of each of its stages, the training, the checkpoints."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from relufy.errors import UserError
from relufy.methods.setting import Progress, no_progress
from relufy.methods.sparsify import sparsify
from relufy.model.checkpoint import load_model, save_checkpoint
from relufy.processes import is_main, join_processes, wait_for_all
from relufy.recipe import Finetune, Recipe
from relufy.train.checkpoints import checkpoint_folder, last_checkpoint, remove_checkpoints
from relufy.train.finetune import UNTRAINED, FinetuneResult, finetune
from relufy.train.stream import WindowStream

TextOf = Callable[[Finetune], "np.ndarray | WindowStream"]
"""Gives the text that a stage is trained on."""
OnStageLog = Callable[[Recipe, dict[str, Any]], None]


@dataclass(frozen=True)
class Run:
    """How a recipe is run; what every stage has in common."""

    output: Path
    tokenizer: PreTrainedTokenizerBase | None
    text_of: TextOf
    teacher: PreTrainedModel | None = None
    resume: bool = False
    shard: bool = False
    provenance: dict[str, Any] | None = None
    dtype: torch.dtype | None = None
    """What the weights are saved in; None: what they were trained in."""
    log_folder: Path | None = None
    tensorboard: bool = False
    on_log: OnStageLog | None = None
    progress: Progress = no_progress
    on_note: Callable[[str], object] = lambda _note: None
    """Called with what a method found out about the model, in a line each."""


def run_recipe(model: PreTrainedModel, recipe: Recipe, run: Run) -> list[FinetuneResult]:
    """Take the model through the recipe's stages and save it to `run.output`; return what each training took.

    Between stages it lies in `stages_folder(run.output)`, which is removed in the end. A run that was
    interrupted goes on in the stage where it stopped. Works on the model in place until a stage is loaded
    from its folder. Raises UserError.
    """
    join_processes()
    stages, results = recipe.stages(), []
    _refuse_nothing_to_resume(run, len(stages))
    wait_for_all()  # no process looks after the main one has begun to write
    for index, stage in enumerate(stages):
        is_last = index == len(stages) - 1
        target = run.output if is_last else stages_folder(run.output) / f"{index + 1}-{stage.name}"
        is_done = target.is_dir() and not is_last
        if not is_done:
            origin = dict(
                run.provenance or {}, training_tokens=sum(s.finetune.tokens for s in stages[: index + 1])
            )
            if len(stages) > 1:
                origin["recipe"] = recipe.to_mapping()
            results.append(_run_stage(model, stage, run, target, origin, is_last))
        if is_done or (run.shard and not is_last):
            model = load_model(target)
    if is_main():
        shutil.rmtree(stages_folder(run.output), ignore_errors=True)
    return results


def stages_folder(output: Path) -> Path:
    """Return where the models lie that finished stages left."""
    return output.with_name(f"{output.name}.stages")


def _run_stage(
    model: PreTrainedModel, stage: Recipe, run: Run, target: Path, origin: dict[str, Any], is_last: bool
) -> FinetuneResult:
    """Run one stage and save it to `target` with its provenance."""
    trains = stage.finetune.steps > 0
    looks_at_text = stage.sparsify is not None and stage.sparsify.needs_text
    windows = run.text_of(stage.finetune) if trains or looks_at_text else None
    if stage.sparsify is not None:
        calibration = None if windows is None else _calibration(windows, stage)
        sparsify(model, stage, calibration, run.progress, on_note=run.on_note)

    done = _train(model, stage, run, target, windows) if trains and windows is not None else UNTRAINED
    if is_last and run.dtype is not None:  # what follows is trained in the model's own
        model = model.to(run.dtype)  # type: ignore[arg-type]
    if is_main():
        save_checkpoint(model, run.tokenizer, target, provenance=origin, weights=done.weights)
        remove_checkpoints(target)
    wait_for_all()
    return done


def _train(
    model: PreTrainedModel, stage: Recipe, run: Run, target: Path, windows: "np.ndarray | WindowStream"
) -> FinetuneResult:
    def on_log(log: dict[str, Any]) -> None:
        if run.on_log is not None:
            run.on_log(stage, log)

    return finetune(
        model,
        stage.finetune,
        windows,
        teacher=run.teacher,
        output=target,
        resume=run.resume and last_checkpoint(checkpoint_folder(target)) is not None,
        shard=run.shard,
        on_log=on_log,
        log_folder=run.log_folder and run.log_folder / stage.name,
        tensorboard=run.tensorboard,
    )


def _calibration(windows: "np.ndarray | WindowStream", stage: Recipe) -> np.ndarray:
    """Return text as an array; of a stream, as much of its beginning as the recipe looks at."""
    if isinstance(windows, np.ndarray):
        return windows
    count = max(1, stage.calibrate.tokens // stage.finetune.window)
    return windows.take(count)


def _refuse_nothing_to_resume(run: Run, num_stages: int) -> None:
    first = run.output if num_stages == 1 else stages_folder(run.output)
    has_begun = (
        stages_folder(run.output).is_dir() or last_checkpoint(checkpoint_folder(run.output)) is not None
    )
    if run.resume and not has_begun:
        raise UserError(f"there is no checkpoint to resume from for {first}; start the run without --resume")
    if not run.resume and stages_folder(run.output).is_dir():
        raise UserError(
            f"{stages_folder(run.output)} holds stages of an interrupted run; resume it, or remove the folder"
        )
