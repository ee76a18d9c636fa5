"""Check 6: whether what log-likelihood promises holds when the model reads its own text.

The dense and the sparse model continue the same texts greedily. A teacher-forced share p of equal choices
would leave p^t of the texts equal after t tokens; what is seen beside it tells whether errors accumulate. The
dense model's loss on what each wrote, in quarters of the length, tells whether the text gets worse or is only
another one.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from relufy.doctor.continuation import agreement, continue_greedily, greedy_matches, losses_along, survival
from relufy.doctor.finding import Finding, percent
from relufy.doctor.patient import Patient
from relufy.doctor.sweep import ALLOWED
from relufy.errors import UserError
from relufy.measure.modes import Scored
from relufy.methods.controls import put_controls
from relufy.model.trial import trial_masks

Masks = Callable[[], AbstractContextManager | None]
DRIFT = 0.1
"""Nats a token by which the sparse model's text may get worse over its length beyond the dense model's."""


def check(patient: Patient, level: float) -> Finding:
    """Compare with the dense original if there is one, else the model with a share of neurons left out."""
    longest = patient.test.shape[1] // 2
    prompts, length = patient.test[: patient.effort.prompts, :longest], patient.effort.new_tokens
    dense, sparse, masks, words = _pair(patient, level)
    texts = continue_greedily(dense, prompts, length, None, patient.effort.batch_size)
    others = continue_greedily(sparse, prompts, length, masks(), patient.effort.batch_size)
    same, lengths = agreement(texts, others)
    forced = greedy_matches(sparse, prompts, texts, masks())
    figures: dict[str, Any] = {
        "compared": words,
        "prompts": len(prompts),
        "prompt_tokens": longest,
        "new_tokens": length,
        "teacher_forced_agreement": forced,
        "same_so_far": same,
        "expected_same_so_far": survival(forced, range(1, length + 1)),
        "mean_same_tokens": float(np.mean(lengths)),
        "dense_loss_of_dense_text": losses_along(dense, prompts, texts),
        "dense_loss_of_sparse_text": losses_along(dense, prompts, others),
    }
    figures["drift"] = _drift(figures)
    status = "good" if figures["drift"] < DRIFT and _worse(figures) < DRIFT else "watch"
    return Finding("generation", "Writing by itself", status, _verdict(figures), figures, _advice(figures))  # type: ignore[arg-type]


def _pair(patient: Patient, level: float) -> tuple[PreTrainedModel, PreTrainedModel, Masks, str]:
    if patient.dense is not None:
        return patient.dense, patient.model, lambda: None, "the dense original and this model"
    if level <= 0:
        raise UserError("no share of the neurons can be left out, so there is nothing to compare with")
    words = f"this model, and the same with {percent(level, 0)} of the neurons left out by an oracle"
    return patient.model, patient.model, lambda: _left_out(patient, level), words


@contextmanager
def _left_out(patient: Patient, level: float) -> Any:
    shares = {(block.index, "down"): level for block in patient.blocks}
    with trial_masks(patient.blocks) as trial:
        put_controls("oracle", trial, patient.blocks, shares, _every_token(), patient.effort.seed)
        yield


class _Everything(Scored):
    """Every token of whatever passes: a generation's steps have lengths of their own."""

    def split(self, values: Any, trailing: int) -> tuple[Any, Any]:
        by_token = values if values.ndim == trailing + 2 else values[None]
        return by_token[:, :0], by_token


def _every_token() -> Scored:
    return _Everything("all", 4)


def _drift(figures: dict[str, Any]) -> float:
    """Return how much worse the sparse text's last quarter is than its first, beyond the dense text's."""
    dense, sparse = figures["dense_loss_of_dense_text"], figures["dense_loss_of_sparse_text"]
    return (sparse[-1] - sparse[0]) - (dense[-1] - dense[0])


def _worse(figures: dict[str, Any]) -> float:
    dense, sparse = figures["dense_loss_of_dense_text"], figures["dense_loss_of_sparse_text"]
    return float(np.mean(sparse) - np.mean(dense))


def _verdict(figures: dict[str, Any]) -> str:
    end = len(figures["same_so_far"])
    return (
        f"Compared: {figures['compared']}. Given the dense text, "
        f"{percent(figures['teacher_forced_agreement'])} of the greedy choices are the same; writing by "
        f"itself, the texts are the same for {figures['mean_same_tokens']:.0f} tokens on average, and "
        f"{percent(figures['same_so_far'][-1], 0)} of them after {end} tokens "
        f"({percent(figures['expected_same_so_far'][-1], 0)} if slips were independent). Under the dense "
        f"model the sparse text costs {_worse(figures):+.2f} nats a token more than the dense one's own, and "
        f"{_drift(figures):+.2f} from its first quarter to its last."
    )


def _advice(figures: dict[str, Any]) -> tuple[str, ...]:
    lines = []
    if figures["drift"] >= DRIFT:
        lines.append("errors accumulate with length: judge methods by generated text too, not by perplexity")
    lines.append("relufy eval with a task that generates (exact match) is the test of what users read")
    return tuple(lines)


def level_for(figures: dict[str, Any]) -> float:
    """Return the greatest swept level within the allowed rise, or else the least one."""
    pairs = zip(figures["levels"], figures["rise"], strict=True)
    within = [level for level, rise in pairs if rise <= ALLOWED]
    return max(within, default=min(figures["levels"]))
