"""`relufy predictor`: give a sparse model the predictor of its active neurons, and say how good it is."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from relufy.activation_sparsity import Predictor
from relufy.errors import UserError
from relufy.measure.prediction.calibrate import measure_curves, measure_predictors
from relufy.measure.prediction.curve import Quality
from relufy.measure.prediction.scorer import Scorer
from relufy.measure.prediction.svd import measure_moments, plain_svd_scorer, svd_scorer
from relufy.measure.prediction.training import Training, train_scorers
from relufy.measure.quality import Perplexity, mean_and_error, perplexity
from relufy.methods.setting import Progress, no_progress
from relufy.model.configuration import sparsity_of, write_sparsity
from relufy.model.fingerprints import with_fingerprints
from relufy.model.places import find_places
from relufy.model.predicting import predicting
from relufy.model.predictor import NeuronPredictor, PredictedLayer, predictable_layers, put_predictor
from relufy.model.provenance import base_provenance
from relufy.model.sites import find_sites
from relufy.text import check_windows

SHARES = (0.6, 0.2, 0.2)
"""Of the windows: to learn from, to set thresholds by (and to stop training by), and to report on."""
LEAST_WINDOWS = 5

DEFINITIONS = {
    "recall": "share of the active neurons that are candidates",
    "weighted recall": "that share of what active neurons put out, |activation| norm(W_down[:, i])",
    "precision": "share of the candidates that are active",
    "candidates": "share of all neurons that are candidates; the engine reads these gate rows",
    "perplexity": "teacher-forced, all tokens but a window's first through the predictor",
}


@dataclass(frozen=True)
class PredictorOptions:
    """What to make; `rank` may be no larger than the gate's. See activation_sparsity.Predictor."""

    kind: str = "svd"
    rank: int = 256
    recall: float = 0.99
    weighted: bool = False
    training: Training = field(default_factory=Training)
    seed: int = 0

    def definition(self) -> Predictor:
        """Return what the checkpoint will say. Raises UserError for values that make no sense."""
        if self.kind == "random":
            raise UserError("a random predictor predicts nothing; choose svd, plain_svd or trained")
        return Predictor(self.kind, self.rank, self.recall, self.weighted)


@dataclass(frozen=True)
class TextParts:
    """Windows, int64 `[windows, length]`, for each purpose; no two of the same text."""

    learn: np.ndarray
    calibrate: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class PredictorReport:
    """How good a predictor is, on text that it has not seen."""

    definition: Predictor
    layers: dict[int, Quality]
    exact: Perplexity
    predicted: Perplexity
    difference: float
    """Of nats per token, predicted less exact, and its standard error over windows."""
    difference_error: float
    tokens: int
    parameters: int
    """Of the predictor, in one layer."""
    gate_parameters: int

    @property
    def perplexity_change(self) -> float:
        """Return by what share the perplexity rises."""
        return math.expm1(self.difference)

    def mean(self, name: str) -> float:
        """Return the mean over layers of one of Quality's figures."""
        return sum(getattr(quality, name) for quality in self.layers.values()) / len(self.layers)

    def to_json(self) -> dict[str, Any]:
        return {
            "predictor": asdict(self.definition),
            "layers": {str(index): asdict(quality) for index, quality in self.layers.items()},
            "perplexity": self.exact.perplexity,
            "predicted_perplexity": self.predicted.perplexity,
            "perplexity_change": self.perplexity_change,
            "nats_difference": self.difference,
            "nats_difference_error": self.difference_error,
            "tokens": self.tokens,
            "parameters": self.parameters,
            "gate_parameters": self.gate_parameters,
            "definitions": DEFINITIONS,
        }


def split_text(windows: np.ndarray, seed: int = 0, test: np.ndarray | None = None) -> TextParts:
    """Deal windows out, without an order among them; with `test`, into the first two parts alone.

    Raises UserError if they are too few.
    """
    if len(windows) < LEAST_WINDOWS:
        raise UserError(f"the text has {len(windows)} windows, a predictor needs {LEAST_WINDOWS} or more")
    dealt = np.random.default_rng(seed).permutation(windows)
    reporting = max(1, round(SHARES[2] * len(windows))) if test is None else 0
    learning = len(dealt) - reporting - max(1, round(SHARES[1] * len(windows)))
    calibrate = dealt[learning : len(dealt) - reporting]
    return TextParts(dealt[:learning], calibrate, dealt[len(dealt) - reporting :] if test is None else test)


def add_predictor(
    model: PreTrainedModel,
    text: TextParts,
    options: PredictorOptions,
    progress: Progress = no_progress,
) -> PredictorReport:
    """Make a predictor, hang it on the model, in place, and return how good it is.

    Raises UserError for a model without zeros at its neurons, or whose neurons can't be predicted, and for a
    rank beyond the gate's.
    """
    definition, blocks, sparsity = options.definition(), find_sites(model), sparsity_of(model)
    layers = predictable_layers(blocks, sparsity)
    _check_rank(layers, definition.rank)
    check_windows(text.learn, model.config.vocab_size)
    scorers = make_scorers(model, layers, text, options, progress)
    predictors = calibrated(model, layers, scorers, text.calibrate, definition, progress)
    tensors = {
        layer.name(name): tensor
        for layer in layers
        for name, tensor in predictors[layer.index].named_buffers()
    }
    provenance = with_fingerprints(
        sparsity.provenance or base_provenance(model),
        find_places(blocks, sparsity),
        [layer.projection for layer in layers],
    )
    found = replace(sparsity, predictor=definition, provenance=provenance)
    put_predictor(blocks, found, tensors)
    write_sparsity(model, found, None)
    return measure_predictor(model, text.test, progress)


def make_scorers(
    model: PreTrainedModel,
    layers: list[PredictedLayer],
    text: TextParts,
    options: PredictorOptions,
    progress: Progress = no_progress,
) -> dict[int, Scorer]:
    """Return the scores of a kind of predictor, by layer."""
    if options.kind == "plain_svd":
        return {layer.index: plain_svd_scorer(layer, options.rank) for layer in layers}
    moments = measure_moments(model, layers, text.learn, progress)
    found = {}
    for done, (layer, seen) in enumerate(zip(layers, moments, strict=True), 1):
        found[layer.index] = svd_scorer(layer, options.rank, seen)
        progress("decomposing gates", done, len(layers))
    if options.kind == "svd":
        return found
    train, held_out = text.learn, text.calibrate
    return train_scorers(model, layers, found, train, held_out, options.recall, options.training, progress)


def calibrated(
    model: PreTrainedModel,
    layers: list[PredictedLayer],
    scorers: Mapping[int, Scorer],
    windows: np.ndarray,
    definition: Predictor,
    progress: Progress = no_progress,
) -> dict[int, NeuronPredictor]:
    """Return predictors with the recall that the definition asks for on these windows."""
    curves = measure_curves(model, layers, scorers, windows, progress)
    return {
        index: scorers[index].predictor(curve.offset_for(definition.recall, definition.weighted))
        for index, curve in curves.items()
    }


def measure_predictor(
    model: PreTrainedModel, windows: np.ndarray, progress: Progress = no_progress
) -> PredictorReport:
    """Return how good the model's predictor is on windows, int64 `[windows, length]`.

    Raises UserError if it has none.
    """
    sparsity = sparsity_of(model)
    if sparsity.predictor is None:
        raise UserError("the model has no predictor; make one with `relufy predictor`")
    layers = predictable_layers(find_sites(model), sparsity)
    predictors = {layer.index: p for layer in layers if (p := layer.predictor()) is not None}
    quality = measure_predictors(model, layers, predictors, windows, progress)
    exact = perplexity(model, windows, on_windows=partial(progress, "measuring perplexity"))
    with predicting(model):
        predicted = perplexity(model, windows, on_windows=partial(progress, "measuring perplexity again"))
    pairs = zip(predicted.per_window, exact.per_window, strict=True)
    difference, error = mean_and_error([a - b for a, b in pairs])
    first = layers[0]
    return PredictorReport(
        definition=sparsity.predictor,
        layers=quality,
        exact=exact,
        predicted=predicted,
        difference=difference,
        difference_error=error,
        tokens=exact.tokens,
        parameters=sparsity.predictor.rank * (first.hidden + first.neurons),
        gate_parameters=first.hidden * first.neurons,
    )


def _check_rank(layers: list[PredictedLayer], rank: int) -> None:
    most = min(min(layer.hidden, layer.neurons) for layer in layers)
    if rank > most:
        raise UserError(f"the gate has rank {most} at most, so a predictor of rank {rank} is of no use")
