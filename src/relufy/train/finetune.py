"""Training a model in place: seeded, checkpointed, resumable, in one process or many."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, set_seed

from relufy.errors import UserError
from relufy.measure.quality import refuse_other_vocabulary
from relufy.model.fingerprints import refuse_training
from relufy.processes import is_main, join_processes, num_processes
from relufy.recipe import Finetune
from relufy.text import check_windows, refuse_long_windows
from relufy.train.adapters import adapted
from relufy.train.arguments import layer_classes, training_arguments
from relufy.train.checkpoints import checkpoint_folder, last_checkpoint, run_folder, step_of
from relufy.train.stream import StoredWindows, WindowStream
from relufy.train.trainer import FinetuneTrainer, OnLog, TrainingWindows

INDEPENDENT = ("log_steps", "save_steps", "accumulate", "gradient_checkpointing", "compile")
"""Settings that a resumed run may change, since they change no weight."""


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tune took. `seconds` are those of this call; all else is of the whole run."""

    steps: int
    tokens: int
    """Predicted tokens; `epochs` times as many as the text has."""
    epochs: float | None
    """None where the text is streamed, so that nobody knows its length."""
    seconds: float
    logs: tuple[dict[str, Any], ...]
    """The reports, as `on_log` got them."""
    weights: dict[str, torch.Tensor] | None = dataclasses.field(default=None, repr=False)
    """Of a model that is left spread over processes: its whole weights, in the main one."""

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(log["loss"] for log in self.logs)


UNTRAINED = FinetuneResult(0, 0, 0.0, 0.0, ())
"""What no steps take."""


def finetune(
    model: PreTrainedModel,
    settings: Finetune,
    windows: np.ndarray | WindowStream,
    *,
    teacher: PreTrainedModel | None = None,
    output: Path | None = None,
    resume: bool = False,
    shard: bool = False,
    on_log: OnLog | None = None,
    log_folder: Path | None = None,
    tensorboard: bool = False,
) -> FinetuneResult:
    """Train the model in place on windows, int64 `[windows, window]` or a stream; return what it took.

    Each epoch of an array is another shuffle of its windows; text that runs out begins anew. `teacher` is the
    dense original, needed for distillation. With an `output`, checkpoints go to `checkpoint_folder(output)`,
    and `resume` goes on from the last one with the same losses as an unbroken run; they are left there for
    the caller to remove (`remove_checkpoints`) once the model is saved. `log_folder` gets the reports as JSON
    lines, and for TensorBoard. Under torchrun or accelerate every process calls this with the same arguments;
    `shard` splits the model over them (FSDP2), and it stays so. Seeds the global random state. Raises
    UserError.
    """
    join_processes()
    if settings.steps == 0:
        return UNTRAINED
    _refuse_unfit(model, settings, windows, teacher, shard)
    stream = windows if isinstance(windows, WindowStream) else stored(windows, settings.seed)
    run = {name: value for name, value in dataclasses.asdict(settings).items() if name not in INDEPENDENT}
    run |= {"shard": shard, "text": stream.about()}
    set_seed(settings.seed)
    started, was_training = time.monotonic(), model.training
    with run_folder(output, run, resume) as (folder, checkpoint), adapted(model, settings.lora) as trained:
        layers = layer_classes(model) if shard else ()
        trainer = FinetuneTrainer(
            model,
            trained,
            settings,
            TrainingWindows(stream, settings, done=step_of(checkpoint)),
            training_arguments(settings, folder, output is not None, layers),
            teacher=teacher if settings.needs_teacher else None,
            on_log=_with_logbook(on_log, log_folder, tensorboard, step_of(checkpoint)),
        )
        try:
            with trainer.watching(), recomputing(trained, settings.gradient_checkpointing and not shard):
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except UserError as error:
            last = output and last_checkpoint(checkpoint_folder(output))
            raise UserError(f"{error}; the last good checkpoint is {last}" if last else str(error)) from None
        finally:
            trainer.accelerator.unwrap_model(trained, keep_fp32_wrapper=False)
            model.zero_grad()
            model.train(was_training)
    weights: Any = trainer.accelerator.get_state_dict(trainer.model_wrapped) if shard else None
    return FinetuneResult(
        steps=settings.steps,
        tokens=settings.tokens,
        epochs=stream.num_windows and settings.steps * settings.batch_size / stream.num_windows,
        seconds=time.monotonic() - started,
        logs=tuple(trainer.state.log_history),
        weights=weights,
    )


def stored(windows: np.ndarray, seed: int) -> WindowStream:
    """Return windows `[windows, window]` as a stream: one seeded shuffle after the other."""
    return WindowStream((StoredWindows(windows, bos=None),), (1.0,), windows.shape[1], seed)


@contextmanager
def recomputing(model: Any, is_wanted: bool) -> Iterator[None]:
    """Compute blocks again for their gradients while this context lasts. (FSDP2 has a way of its own.)"""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if is_wanted:
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        if is_wanted:
            getattr(model, f"{name}_checkpointing_disable")()


def _with_logbook(on_log: OnLog | None, folder: Path | None, tensorboard: bool, done: int) -> OnLog | None:
    if folder is None or not is_main():
        return on_log
    from relufy.train.logbook import Logbook

    logbook = Logbook(folder, tensorboard)
    logbook.resume_at(done)

    def report(log: dict[str, Any]) -> None:
        logbook.write(log)
        if on_log is not None:
            on_log(log)

    return report


def _refuse_unfit(
    model: PreTrainedModel,
    settings: Finetune,
    windows: np.ndarray | WindowStream,
    teacher: PreTrainedModel | None,
    shard: bool,
) -> None:
    refuse_training(model)
    if shard and num_processes() == 1:
        raise UserError("there is one process, so nothing to shard over; start several, or do not shard")
    refuse_long_windows(settings.window, getattr(model.config, "max_position_embeddings", None))
    if shard and settings.lora is not None:
        raise UserError(
            "LoRA needs whole weights to be merged into; train it without sharding, or shard without it"
        )
    if isinstance(windows, WindowStream):
        windows.check(model.config.vocab_size)
    else:
        check_windows(windows, model.config.vocab_size)
    window = windows.window if isinstance(windows, WindowStream) else windows.shape[1]
    if window != settings.window:
        raise UserError(f"the recipe asks for windows of {settings.window} tokens, found {window}")
    if not settings.needs_teacher:
        return
    if teacher is None:
        raise UserError(
            "distill and match_hidden need the dense original as teacher; give it, or set both to 0"
        )
    if teacher is model:
        raise UserError("the teacher is the very model to be trained; load the dense original a second time")
    refuse_other_vocabulary(teacher, model)
