"""Predictors that are trained (Deja Vu, arXiv 2310.17157, appendix; LLM in a Flash, arXiv 2312.11514).

Two linear maps without a non-linearity between them, and binary cross-entropy in which an active neuron
weighs 1 and an inactive one the share of active ones + 0.005, as in Deja Vu. Unlike there, the start is the
decomposition of the gate (svd.py) with its margins as logits, so that little text is enough; each neuron has
a bias, which costs nothing because thresholds are by neuron anyway; all layers learn from each batch as it
passes, so that no states are stored; and the best round is the one that needs the fewest candidates for the
wanted recall on text that is not trained on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from relufy.measure.prediction.calibrate import measure_curves
from relufy.measure.prediction.scorer import Scorer
from relufy.measure.prediction.states import LayerStates, Progress, stream_states
from relufy.model.predictor import PredictedLayer

WEIGHT_FLOOR = 0.005
PROBIT = 1.702
"""The logistic function of 1.702 z is nearest to the normal distribution's."""


@dataclass(frozen=True)
class Training:
    """How predictors are trained. A round is once through the text."""

    rounds: int = 8
    patience: int = 2
    """Ends after so many rounds without a better one."""
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    batch_positions: int = 512
    seed: int = 0


def train_scorers(
    model: PreTrainedModel,
    layers: Sequence[PredictedLayer],
    start: Mapping[int, Scorer],
    train: np.ndarray,
    held_out: np.ndarray,
    recall: float,
    training: Training,
    progress: Progress = lambda _task, _done, _all: None,
) -> dict[int, Scorer]:
    """Return the best scorers by layer, from those to start with; windows are int64 `[windows, length]`.

    Each layer keeps the round that needs the fewest candidates for this recall on the held-out windows.
    """
    students = {layer.index: _Student(start[layer.index], training) for layer in layers}
    best = dict(start)
    density = _densities(model, layers, best, held_out, recall)
    random, unchanged = np.random.default_rng(training.seed), 0
    for turn in range(training.rounds):
        _run_round(model, layers, students, random.permutation(train), progress)
        scorers = {index: student.scorer() for index, student in students.items()}
        found = _densities(model, layers, scorers, held_out, recall)
        better = {index for index in found if found[index] < density[index]}
        best |= {index: scorers[index] for index in better}
        density |= {index: found[index] for index in better}
        unchanged = 0 if better else unchanged + 1
        progress("training predictors", turn + 1, training.rounds)
        if unchanged == training.patience:
            break
    return best


def _run_round(
    model: PreTrainedModel,
    layers: Sequence[PredictedLayer],
    students: Mapping[int, "_Student"],
    windows: np.ndarray,
    progress: Progress,
) -> None:
    def see(states: LayerStates) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            students[states.layer.index].learn(states.inputs.clone(), states.active.clone())

    stream_states(model, layers, windows, see, "training predictors: a round", progress)


def _densities(
    model: PreTrainedModel,
    layers: Sequence[PredictedLayer],
    scorers: Mapping[int, Scorer],
    windows: np.ndarray,
    recall: float,
) -> dict[int, float]:
    """Return the share of neurons that each layer needs as candidates for a recall."""
    curves = measure_curves(model, layers, scorers, windows)
    return {index: curve.at(curve.offset_for(recall)).density for index, curve in curves.items()}


class _Student:
    """The predictor of a layer that learns."""

    def __init__(self, start: Scorer, training: Training) -> None:
        sharpness = PROBIT / start.scale.clamp_min(start.scale.median() / 10)
        self._inner = nn.Parameter(start.inner.clone())
        self._outer = nn.Parameter(start.outer * sharpness[:, None])
        self._bias = nn.Parameter(-start.base * sharpness)
        parameters = [
            {"params": [self._inner, self._outer], "weight_decay": training.weight_decay},
            {"params": [self._bias], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate)
        self._batch = training.batch_positions

    def learn(self, inputs: torch.Tensor, active: torch.Tensor) -> None:
        """Take a step for each batch of states, `[positions, hidden]` and bool `[positions, neurons]`."""
        for x, labels in zip(inputs.split(self._batch), active.split(self._batch), strict=True):
            loss = self._loss(x, labels.float())
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._optimizer.step()

    def _loss(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = F.linear(F.linear(x, self._inner), self._outer, self._bias)
        weights = torch.where(labels > 0, 1.0, labels.mean() + WEIGHT_FLOOR)
        return F.binary_cross_entropy_with_logits(logits, labels, weights)

    def scorer(self) -> Scorer:
        bias = self._bias.detach().clone()
        return Scorer(
            self._inner.detach().clone(), self._outer.detach().clone(), -bias, torch.ones_like(bias)
        )
