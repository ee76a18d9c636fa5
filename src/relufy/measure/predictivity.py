"""Predictivity: how well it can be told beforehand which neurons will be active (ReLU2 Wins, arXiv
2402.03804; Deja Vu, arXiv 2310.17157).

Predictors are those of measure/prediction: two linear maps of low rank, from the gate's singular value
decomposition, or trained with Deja Vu's weighted loss from that start. Here each lets through as many neurons
of a token as `multiple` times the layer's mean number of active ones, those with the greatest scores, and is
compared with two masks that let through exactly as many: the oracle, the greatest contributions |a_i|
||W_down[:, i]||, and random ones. Perplexity is with all sampled layers masked at once, all other layers as
they are; a window's first position stays dense. Learned, stopped and tested on different windows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from relufy.errors import UserError
from relufy.measure.modes import Scored, WindowLosses, window_losses
from relufy.measure.prediction.calibrate import down_norms
from relufy.measure.prediction.scorer import Scorer
from relufy.measure.prediction.states import SKIPPED, LayerStates, stream_states
from relufy.measure.prediction.svd import measure_moments, svd_scorer
from relufy.measure.prediction.training import Training, train_scorers
from relufy.measure.quality import Difference, Perplexity
from relufy.model.configuration import sparsity_of
from relufy.model.predicting import watching
from relufy.model.predictor import PredictedLayer, predictable_layers
from relufy.model.selections import greatest
from relufy.model.structure import find_blocks

PREDICTORS = ("svd", "trained")
MASKS = ("oracle", *PREDICTORS, "random")
MULTIPLES = (1.0, 1.5, 2.0)
SAMPLED_LAYERS, RANK, LEAST_WINDOWS = 4, 64, 5
DEFINITIONS = {
    "predictivity": "recall: share of active neurons among those with the greatest scores, `multiple` times "
    "as many as are active on average; precision: share of these that are active",
    "masks": "perplexity when the sampled layers keep so many neurons of each token: the oracle's greatest "
    "contributions, a predictor's greatest scores, or random ones; nats more than without, paired by window",
}


@dataclass(frozen=True)
class LayerPredictivity:
    """How well a predictor finds a layer's active neurons, at one number of candidates."""

    kind: str
    layer: int
    multiple: float
    kept_share: float
    recall: float
    precision: float


@dataclass(frozen=True)
class MaskedQuality:
    """What is left of the model when sampled layers keep so many neurons."""

    mask: str
    multiple: float
    kept_share: float
    """The mean over the sampled layers."""
    perplexity: Perplexity
    difference: Difference


@dataclass(frozen=True)
class Predictivity:
    """Recall and precision by predictor and layer, and perplexity by mask, on held-out windows."""

    layers: tuple[int, ...]
    rank: int
    active_share: tuple[float, ...]
    """By sampled layer."""
    perplexity: Perplexity
    predictors: tuple[LayerPredictivity, ...]
    masks: tuple[MaskedQuality, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain data, without each window's own perplexity."""
        plain = asdict(self)
        for found in (plain, *plain["masks"]):
            found["perplexity"].pop("per_window")
        return plain


def predictivity(
    model: PreTrainedModel,
    windows: np.ndarray,
    layers: Sequence[int] | None = None,
    rank: int = RANK,
    multiples: Sequence[float] = MULTIPLES,
    training: Training | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> Predictivity:
    """Measure predictors on sampled layers, 4 by default, evenly spread; windows: int64 `[windows, length]`.

    60 % of the windows are learned from, 20 % stop the training, 20 % are reported on. Raises UserError for
    fewer than 5 windows, a layer that does not exist, and neurons that are never zero.
    """
    if len(windows) < LEAST_WINDOWS:
        raise UserError(
            f"predictors need {LEAST_WINDOWS} windows or more, found {len(windows)}; give more text"
        )
    found = {layer.index: layer for layer in predictable_layers(find_blocks(model), sparsity_of(model))}
    chosen = [found[index] for index in _checked(layers, list(found))]
    learn, stop, test = np.split(windows, [int(0.6 * len(windows)), int(0.8 * len(windows))])
    moments = measure_moments(model, chosen, learn)
    svd = {layer.index: svd_scorer(layer, rank, m) for layer, m in zip(chosen, moments, strict=True)}
    trained = train_scorers(model, chosen, svd, learn, stop, 0.95, training or Training(seed=seed))
    shares = _active_shares(model, chosen, learn)
    runs = _Runs(model, chosen, {"svd": svd, "trained": trained}, shares, test, batch_size, seed)
    return Predictivity(
        layers=tuple(layer.index for layer in chosen),
        rank=rank,
        active_share=tuple(shares[layer.index] for layer in chosen),
        perplexity=runs.exact.perplexity(),
        predictors=tuple(found for multiple in multiples for found in runs.recalls(multiple)),
        masks=tuple(runs.quality(mask, multiple) for multiple in multiples for mask in MASKS),
    )


Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From an MLP's inputs `[..., hidden]` and its neurons `[..., neurons]` to what decides which are kept."""


class _Runs:
    """Runs on the windows that are reported on."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[PredictedLayer],
        scorers: Mapping[str, Mapping[int, Scorer]],
        shares: Mapping[int, float],
        windows: np.ndarray,
        batch_size: int,
        seed: int,
    ) -> None:
        self._model, self._layers, self._scorers, self._shares = model, layers, scorers, shares
        self._windows, self._batch_size, self._seed = windows, batch_size, seed
        self._scored = Scored("all", windows.shape[1])
        self.exact = self._losses()

    def kept(self, layer: PredictedLayer, multiple: float) -> int:
        return max(1, min(layer.neurons, round(multiple * self._shares[layer.index] * layer.neurons)))

    def recalls(self, multiple: float) -> list[LayerPredictivity]:
        """Return what each predictor finds in each layer, the model being exact meanwhile."""
        counts = {(kind, layer.index): np.zeros(3) for kind in PREDICTORS for layer in self._layers}

        def see(states: LayerStates) -> None:
            for kind in PREDICTORS:
                scorer, count = self._scorers[kind][states.layer.index], self.kept(states.layer, multiple)
                chosen = greatest(scorer.margins(states.inputs), count)
                both = (chosen & states.active).sum()
                counts[kind, states.layer.index] += [int(both), int(states.active.sum()), int(chosen.sum())]

        stream_states(self._model, self._layers, self._windows, see, batch_size=self._batch_size)
        return [
            LayerPredictivity(
                kind, layer.index, multiple, self.kept(layer, multiple) / layer.neurons, recall, precision
            )
            for layer in self._layers
            for kind in PREDICTORS
            for recall, precision in [_shares_of(counts[kind, layer.index])]
        ]

    def quality(self, mask: str, multiple: float) -> MaskedQuality:
        """Return the perplexity with all sampled layers masked."""
        with self._masked(mask, multiple):
            losses = self._losses()
        shares = [self.kept(layer, multiple) / layer.neurons for layer in self._layers]
        kept = sum(shares) / len(shares)
        return MaskedQuality(mask, multiple, kept, losses.perplexity(), losses.minus(self.exact))

    def _losses(self) -> WindowLosses:
        return window_losses(self._model, self._windows, self._scored, self._batch_size)

    @contextmanager
    def _masked(self, mask: str, multiple: float) -> Iterator[None]:
        with ExitStack() as hooks:
            for layer in self._layers:
                state = _Masked(self._scored, self._score(mask, layer), self.kept(layer, multiple))
                hooks.enter_context(watching(layer, state.read, state.masked))
            yield

    def _score(self, mask: str, layer: PredictedLayer) -> Score:
        if mask in PREDICTORS:
            return lambda inputs, _neurons: self._scorers[mask][layer.index].margins(inputs.float())
        if mask == "oracle":
            norms = down_norms(layer)
            return lambda _inputs, neurons: neurons.float().abs() * norms
        generator = torch.Generator(self._model.device).manual_seed(self._seed * 1009 + layer.index)
        return lambda _inputs, neurons: torch.rand(neurons.shape, generator=generator, device=neurons.device)


class _Masked:
    """A layer that keeps the neurons with the greatest scores."""

    def __init__(self, scored: Scored, score: Score, count: int) -> None:
        self._scored, self._score, self._count = scored, score, count
        self._inputs = torch.empty(0)

    def read(self, inputs: torch.Tensor) -> None:
        self._inputs = inputs

    def masked(self, neurons: torch.Tensor) -> torch.Tensor:
        _, inputs = self._scored.split(self._inputs, 1)
        _, values = self._scored.split(neurons, 1)
        keeps = greatest(self._score(inputs, values), self._count)
        keeps[:, :SKIPPED] = True
        return torch.where(keeps, values, 0).reshape(neurons.shape)


def _active_shares(
    model: PreTrainedModel, layers: Sequence[PredictedLayer], windows: np.ndarray
) -> dict[int, float]:
    sums = {layer.index: np.zeros(2) for layer in layers}

    def see(states: LayerStates) -> None:
        sums[states.layer.index] += [int(states.active.sum()), states.active.numel()]

    stream_states(model, layers, windows, see)
    return {index: float(active / all_) for index, (active, all_) in sums.items()}


def _checked(layers: Sequence[int] | None, known: Sequence[int]) -> list[int]:
    if layers is None:
        places = np.linspace(0, len(known) - 1, min(SAMPLED_LAYERS, len(known)))
        return [known[int(place)] for place in places.round()]
    unknown = [layer for layer in layers if layer not in known]
    if unknown or not layers:
        raise UserError(f"layers with zeros at their neurons are {list(known)}, found {list(layers)}")
    return sorted(set(layers))


def _shares_of(counts: np.ndarray) -> tuple[float, float]:
    both, active, chosen = counts
    return float(both / active) if active else 1.0, float(both / chosen)
