"""A transformers.Trainer with our losses: it reports through a callback and prints nothing."""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from relufy.errors import UserError
from relufy.processes import (
    from_all,
    is_main,
    num_processes,
    process_index,
    sum_over_processes,
)
from relufy.recipe import Finetune
from relufy.train.arguments import shard_teacher
from relufy.train.checkpoints import finish_checkpoint
from relufy.train.input_penalty import InputPenalty
from relufy.train.losses import loss_terms
from relufy.train.monitor import Monitor
from relufy.train.optimizers import make_optimizer
from relufy.train.penalty import NeuronPenalty, SparsityPenalty
from relufy.train.stream import WindowStream

OnLog = Callable[[dict[str, Any]], None]

PROGRESS_FILE = "relufy_progress.json"
"""In a checkpoint: where the penalties' controllers stand, and the sums of the report to come."""


class FinetuneTrainer(Trainer):
    """Trains on windows in the order given.

    After every `log_steps` steps and the last, `on_log` gets `step`, `loss`, its terms, `gradient_norm`
    (before it was clipped), `learning_rate` (of the last step), `tokens` (predicted so far),
    `tokens_per_second` (of this run) and what the monitor saw. Losses and norms are means since the last
    report. Reports are kept in `state.log_history`, and so in checkpoints.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trained: Any,
        settings: Finetune,
        windows: IterableDataset,
        arguments: TrainingArguments,
        *,
        teacher: PreTrainedModel | None,
        on_log: OnLog | None,
    ) -> None:
        """`trained` is `model`, or the adapters around it."""
        self.settings = settings
        self.teacher = teacher.eval() if teacher is not None else None
        self.penalties: dict[str, SparsityPenalty] = {}
        if settings.penalty is not None:
            self.penalties["penalty"] = NeuronPenalty(model, settings.penalty, settings.steps)
        if settings.input_penalty is not None:
            self.penalties["input_penalty"] = InputPenalty(model, settings.input_penalty, settings.steps)
        self.monitor = Monitor(model)
        self.sums: dict[str, torch.Tensor] = {}
        """Of the loss, its terms and the gradient norm since the report of step `last_report`."""
        self.last_report = 0
        self.learning_rate = 0.0
        super().__init__(
            trained,
            arguments,
            train_dataset=windows,
            callbacks=[StepReport(self, on_log)],
        )
        self.remove_callback(PrinterCallback)
        if self.teacher is not None and self.args.fsdp:
            shard_teacher(self.teacher)
        elif self.teacher is not None:
            self.teacher.to(self.args.device)  # type: ignore[arg-type]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Attach the penalties to the model while this context lasts."""
        with ExitStack() as stack:
            for penalty in self.penalties.values():
                stack.enter_context(penalty.attached())
            yield

    def is_reported(self, step: int) -> bool:
        """Return whether this step, counted from 1, ends in a report."""
        return step % self.settings.log_steps == 0 or step == self.settings.steps

    def get_train_dataloader(self) -> DataLoader:
        """Return this process's batches, as they are: accelerate would have the main one read for all.

        Reading draws a seed when it begins; a generator of its own leaves dropout's numbers alone.
        """
        windows: Any = self.train_dataset
        return DataLoader(
            windows,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=default_data_collator,
            generator=torch.Generator(),
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = make_optimizer(model or self.model, self.settings)  # type: ignore[arg-type]
        return self.optimizer

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the mean loss of a part of a batch; the parts are equal, so the Trainer's mean is exact."""
        assert not return_outputs and num_items_in_batch is None
        is_seen = self.is_reported(self.state.global_step + 1)
        if is_seen:  # hooks that come and go would be compiled anew each time
            model = getattr(model, "_orig_mod", model)
        with self.monitor.watching() if is_seen else nullcontext():
            terms = loss_terms(self.settings, model, self.teacher, inputs["input_ids"])
        for name, penalty in self.penalties.items():
            terms[name] = penalty.term()
            terms["loss"] = terms["loss"] + penalty.strength() * terms[name]
        for name, value in terms.items():
            self._add(name, value.detach() / self.settings.accumulate)
        return terms["loss"]

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        """Clip the gradients, or raise UserError rather than take a step that would ruin the model."""
        found: Any = super()._clip_grad_norm(model)
        norm: torch.Tensor = found.full_tensor() if hasattr(found, "full_tensor") else found
        self.learning_rate = self.optimizer.param_groups[0]["lr"]  # type: ignore[union-attr]
        if not math.isfinite(norm.item()):
            raise UserError(
                f"the training diverged at step {self.state.global_step + 1} (the gradient is no finite "
                f"number, learning rate {self.learning_rate:.2g}); no such step was taken: lower "
                "learning_rate"
            )
        self._add("gradient_norm", norm.detach())
        return norm

    def _add(self, name: str, value: torch.Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def mean_sums(self) -> dict[str, float]:
        """Return the sums since the last report, as means over processes; all of them must call this."""
        if not self.sums:
            return {}
        means = sum_over_processes(torch.stack(list(self.sums.values()))) / num_processes()
        return dict(zip(self.sums, means.tolist(), strict=True))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Keep the Trainer's own figures out of the history, which holds the reports of the steps."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save among the unfinished and move it when it is whole, or leave nothing and raise UserError.

        If one process fails, all do.
        """
        folder: Any = self.args.output_dir
        written, problem = Path(folder) / f"checkpoint-{self.state.global_step}", ""
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
            problem = " ".join(str(error).split())[:200]
        problems = [found for found in from_all(problem) if found]
        if is_main():
            _ = shutil.rmtree(written, ignore_errors=True) if problems else finish_checkpoint(written)
        if problems:
            raise UserError(
                f"the checkpoint of step {self.state.global_step} could not be written ({problems[0]})"
            )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        progress = {
            "penalties": {name: penalty.state() for name, penalty in self.penalties.items()},
            "sums": self.mean_sums(),
            "last_report": self.last_report,
        }
        if is_main():
            (Path(output_dir) / PROGRESS_FILE).write_text(json.dumps(progress))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        progress = json.loads((Path(checkpoint) / PROGRESS_FILE).read_text())
        for name, penalty in self.penalties.items():
            penalty.load_state(progress["penalties"][name])
        device = self.args.device
        self.sums = {name: torch.tensor(value, device=device) for name, value in progress["sums"].items()}
        self.last_report = progress["last_report"]


class StepReport(TrainerCallback):
    """Reports steps."""

    def __init__(self, trainer: FinetuneTrainer, on_log: OnLog | None) -> None:
        self.trainer = trainer
        self.report = on_log
        self.first_step = 0
        self.started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step = state.global_step
        self.started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        strengths = {f"{name}_strength": p.strength() for name, p in trainer.penalties.items()}
        for penalty in trainer.penalties.values():
            penalty.after_step(state.global_step)
        if not trainer.is_reported(state.global_step):
            return
        log: dict[str, Any] = {"step": state.global_step} | self._means(state.global_step)
        log |= {name: float(strength) for name, strength in strengths.items()}
        for name, penalty in trainer.penalties.items():
            prefix = name.removesuffix("penalty")
            log |= {f"{prefix}{key}": value for key, value in penalty.metrics().items()}
        tokens_per_step = trainer.settings.batch_size * (trainer.settings.window - 1)
        done, seconds = state.global_step - self.first_step, time.monotonic() - self.started
        log |= {
            "learning_rate": trainer.learning_rate,
            "tokens": state.global_step * tokens_per_step,
            "tokens_per_second": done * tokens_per_step / seconds,
        } | trainer.monitor.metrics()
        state.log_history.append(log)
        if self.report is not None and is_main():
            self.report(dict(log))

    def _means(self, step: int) -> dict[str, float]:
        """Return the means over the steps since the last report."""
        trainer = self.trainer
        sums, steps = trainer.mean_sums(), step - trainer.last_report
        trainer.sums, trainer.last_report = {}, step
        return {name: value / steps for name, value in sums.items()}


class TrainingWindows(IterableDataset):
    """This process's windows of a whole run; iterating begins after those of `done` steps.

    Each part of a step is `size` windows for the first process, as many for the next, and so on.
    """

    def __init__(self, stream: WindowStream, settings: Finetune, done: int) -> None:
        self.stream = stream.skip(done * settings.batch_size)
        self.num_windows = settings.steps * settings.batch_size
        self.num_left = self.num_windows - done * settings.batch_size
        self.size = settings.batch_size // (settings.accumulate * num_processes())

    def __len__(self) -> int:
        return self.num_windows // num_processes()

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for index, window in enumerate(islice(self.stream, self.num_left)):
            if index // self.size % num_processes() == process_index():
                yield window
