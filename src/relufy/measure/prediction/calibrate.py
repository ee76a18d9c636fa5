"""Thresholds for a wanted recall, and how well predictors do on another text."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from relufy.measure.prediction.curve import MarginCurve, Quality
from relufy.measure.prediction.scorer import Scorer
from relufy.measure.prediction.states import LayerStates, Progress, stream_states
from relufy.model.predictor import NeuronPredictor, PredictedLayer


def down_norms(layer: PredictedLayer) -> torch.Tensor:
    """Return the norm of each neuron's column of down, float32 `[neurons]`."""
    return layer.block.down.matrix().float().norm(dim=0)


def measure_curves(
    model: PreTrainedModel,
    layers: Sequence[PredictedLayer],
    scorers: Mapping[int, Scorer],
    windows: np.ndarray,
    progress: Progress = lambda _task, _done, _all: None,
) -> dict[int, MarginCurve]:
    """Return, by layer, how the margins of active and of all neurons are distributed on windows."""
    curves = {layer.index: MarginCurve() for layer in layers}
    norms = {layer.index: down_norms(layer) for layer in layers}

    def see(states: LayerStates) -> None:
        index = states.layer.index
        curves[index].add(scorers[index].margins(states.inputs), states.neurons.abs() * norms[index])

    stream_states(model, layers, windows, see, "setting thresholds", progress)
    return curves


def measure_predictors(
    model: PreTrainedModel,
    layers: Sequence[PredictedLayer],
    predictors: Mapping[int, NeuronPredictor],
    windows: np.ndarray,
    progress: Progress = lambda _task, _done, _all: None,
) -> dict[int, Quality]:
    """Return each layer's recall, precision and density on windows, the model being exact meanwhile."""
    sums = {layer.index: _Sums(down_norms(layer)) for layer in layers}

    def see(states: LayerStates) -> None:
        candidates = predictors[states.layer.index].candidates(states.inputs)
        sums[states.layer.index].add(candidates, states.neurons)

    stream_states(model, layers, windows, see, "measuring recall", progress)
    return {index: found.quality() for index, found in sums.items()}


class _Sums:
    """Counts of neurons that were candidates, active, and both."""

    def __init__(self, norms: torch.Tensor) -> None:
        self._norms = norms
        self._counts = np.zeros(6)

    def add(self, candidates: torch.Tensor, neurons: torch.Tensor) -> None:
        active, output = neurons != 0, (neurons.abs() * self._norms).double()
        found = candidates & active
        parts = (active, found, candidates, output, output * candidates)
        self._counts += [float(candidates.numel()), *(float(part.sum()) for part in parts)]

    def quality(self) -> Quality:
        every, active, found, candidates, output, covered = self._counts
        return Quality(
            recall=found / active if active else 1.0,
            weighted_recall=covered / output if output else 1.0,
            precision=found / candidates if candidates else 1.0,
            density=candidates / every,
            active=active / every,
        )
