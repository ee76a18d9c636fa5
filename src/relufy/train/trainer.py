"""A transformers.Trainer with our losses: it reports through a callback and prints nothing."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from relufy.errors import UserError
from relufy.recipe import Finetune
from relufy.train.losses import loss_terms

OnLog = Callable[[dict[str, Any]], None]

ADAM_BETAS = (0.9, 0.95)
"""A short memory of squared gradients, for short runs: it closed 91.1 % of the KL, 0.999 closed 90.6 %."""
MAX_GRADIENT_NORM = 1.0


class FinetuneTrainer(Trainer):
    """Trains on `windows` in the order given, which must be exactly those that the steps need.

    After each step `on_log` gets `step`, `loss`, its terms, `learning_rate`, `tokens` (predicted so far) and
    `tokens_per_second` (of this run); the logs are also kept in `state.log_history`, and so in checkpoints.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: Finetune,
        windows: np.ndarray,
        folder: Path,
        *,
        teacher: PreTrainedModel | None,
        saves: bool,
        on_log: OnLog | None,
    ) -> None:
        assert len(windows) == settings.steps * settings.batch_size
        self.settings = settings
        self.teacher = teacher.eval() if teacher is not None else None
        self.sums: dict[str, torch.Tensor] = {}
        super().__init__(
            model,
            training_arguments(settings, folder, saves),
            data_collator=default_data_collator,
            train_dataset=WindowDataset(windows),
            callbacks=[StepReport(self, on_log)],
        )
        self.remove_callback(PrinterCallback)
        if self.teacher is not None:
            self.teacher.to(self.args.device)  # type: ignore[arg-type]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the mean loss of a part of a batch; the parts are equal, so the Trainer's mean is exact."""
        assert not return_outputs and num_items_in_batch is None
        terms = loss_terms(self.settings, model, self.teacher, inputs["input_ids"])
        for name, value in terms.items():
            share = value.detach() / self.settings.accumulate
            self.sums[name] = self.sums[name] + share if name in self.sums else share
        return terms["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Keep the Trainer's own figures out of the history, which holds the reports of the steps."""


class StepReport(TrainerCallback):
    """Checks every step before it is taken, and reports it afterwards."""

    def __init__(self, trainer: FinetuneTrainer, on_log: OnLog | None) -> None:
        self.trainer = trainer
        self.report = on_log
        self.learning_rate = 0.0
        self.first_step = 0
        self.started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step, self.started = state.global_step, time.monotonic()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise UserError rather than take a step that would ruin the model."""
        optimizer: Any = self.trainer.optimizer
        self.learning_rate = optimizer.param_groups[0]["lr"]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        loss = float(self.trainer.sums["loss"])
        if not math.isfinite(loss) or not bool(torch.isfinite(norm)):
            raise UserError(
                f"the fine-tune diverged at step {state.global_step + 1} (loss {loss}, learning rate "
                f"{self.learning_rate:.2g}); no such step was taken: lower learning_rate"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        terms = {name: float(value) for name, value in self.trainer.sums.items()}
        self.trainer.sums = {}
        settings = self.trainer.settings
        tokens_per_step = settings.batch_size * (settings.window - 1)
        seconds = time.monotonic() - self.started
        log = {
            "step": state.global_step,
            **terms,
            "learning_rate": self.learning_rate,
            "tokens": state.global_step * tokens_per_step,
            "tokens_per_second": (state.global_step - self.first_step) * tokens_per_step / seconds,
        }
        state.log_history.append(log)
        if self.report is not None:
            self.report(dict(log))


class WindowDataset(Dataset):
    """Windows of tokens as the Trainer wants them."""

    def __init__(self, windows: np.ndarray) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.from_numpy(self.windows[index])}


def training_arguments(settings: Finetune, folder: Path, saves: bool) -> TrainingArguments:
    """Return the Trainer's arguments: one pass in the given order, in one process, without any output.

    Raises UserError where `torchrun` started several processes, which would multiply the batch.
    """
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size // settings.accumulate,
        gradient_accumulation_steps=settings.accumulate,
        train_sampling_strategy="sequential",
        optim="adamw_torch",
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=ADAM_BETAS[0],
        adam_beta2=ADAM_BETAS[1],
        max_grad_norm=MAX_GRADIENT_NORM,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup_steps,
        seed=settings.seed,
        save_strategy="steps" if saves else "no",
        save_steps=settings.save_steps,
        save_total_limit=2,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    if args.world_size > 1:
        raise UserError(
            f"fine-tuning runs in one process for now, not {args.world_size}; start it without torchrun"
        )
    if args.n_gpu > 1:
        args._n_gpu = 1  # else the Trainer would multiply the batch by the number of GPUs
    return args
