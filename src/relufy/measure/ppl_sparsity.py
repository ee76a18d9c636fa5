"""PPL-p% sparsity: the share of neurons that can be left out before perplexity grows by p % (Sparsing Law,
arXiv 2411.02335, section 3).

A criterion says which neurons go first, from none at c = 0 to all at c = 1. A bisection finds the greatest c
at which exp(loss - loss of the whole model) <= 1 + p / 100. The paper's criterion, `cett`, is itself a
search in each layer: the greatest epsilon whose mean CETT is at most c, found on the whole model. The others
are what the paper compares with:

- `cett`: ||n_i|| < epsilon_layer, each layer at the same CETT c;
- `universal`: ||n_i|| < epsilon, one for all layers, the c-quantile of all ||n_i||;
- `fat`: |a_i| < epsilon, one for all layers, the c-quantile of all |a_i| (the paper's FAT-epsilon);
- `topk`: in each layer all but the (1 - c) f neurons of a token with the greatest ||n_i||.

n_i = a_i W_down[:, i], a_i being what down reads. As CETT, this is an oracle: it needs every a_i.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel

from relufy.errors import UserError
from relufy.measure.cett import EpsilonSearch
from relufy.measure.modes import Scored, WindowLosses, window_losses
from relufy.measure.neuron_masks import masked_neurons
from relufy.measure.sketch import Sketch
from relufy.model.selections import greatest
from relufy.model.structure import find_blocks
from relufy.schema import suggest

PERCENT = 1.0
TOLERANCE = 1 / 512
"""Of c: how far the bisection's two ends are apart at last."""
LeftOut = Callable[[int, torch.Tensor], torch.Tensor]
"""From a layer and its activations, `[..., neurons]`, to which neurons are left out: bool."""


@dataclass(frozen=True)
class PplSparsity:
    """The neurons that can be left out at so much more perplexity, by layer, and how it was found."""

    percent: float
    criterion: str
    level: float
    """The criterion's c at the end: for `cett` the CETT of every layer."""
    sparsity: tuple[float, ...]
    """Zeros count among those left out."""
    ratio: float
    """The perplexity over the whole model's, within 1 + percent / 100."""
    perplexity: float
    tokens: int

    @property
    def mean(self) -> float:
        return sum(self.sparsity) / len(self.sparsity)


def ppl_sparsity(
    model: PreTrainedModel,
    windows: np.ndarray,
    percent: float = PERCENT,
    criterion: str = "cett",
    batch_size: int = 16,
    tolerance: float = TOLERANCE,
) -> PplSparsity:
    """Return the CETT-PPL-p% sparsity, or that of another criterion, on windows: int64 `[windows, length]`.

    The windows are run once for each step of the bisection and, with `cett`, up to four times more; nothing
    of them is kept. Raises UserError for a negative percentage and a criterion that does not exist.
    """
    _check(percent, criterion)
    run = _Pruned(model, windows, batch_size)
    whole = run.losses(0.0, lambda _layer, values: values == 0)
    at = CRITERIA[criterion](model, windows, batch_size)
    allowed = math.log1p(percent / 100)

    def is_allowed(level: float) -> bool:
        return _nats(run.losses(level, at(level))) - _nats(whole) <= allowed

    low, high = (1.0, 1.0) if is_allowed(1.0) else (0.0, 1.0)
    while high - low > tolerance:
        middle = (low + high) / 2
        low, high = (middle, high) if is_allowed(middle) else (low, middle)
    ratio = math.exp(_nats(run.losses(low, at(low))) - _nats(whole))
    return PplSparsity(percent, criterion, low, run.shares[low], ratio, math.exp(_nats(whole)), whole.tokens)


class _Pruned:
    """The losses of the model without some of its neurons, and the share of these."""

    def __init__(self, model: PreTrainedModel, windows: np.ndarray, batch_size: int) -> None:
        self._model, self._windows, self._batch_size = model, windows, batch_size
        self._scored = Scored("all", windows.shape[1])
        self._known: dict[float, WindowLosses] = {}
        self.shares: dict[float, tuple[float, ...]] = {}

    def losses(self, level: float, left_out: LeftOut) -> WindowLosses:
        """Return the losses at a criterion's level; what is known is not run again, level 0 leaves all in."""
        if level not in self._known:
            counts = torch.zeros(len(find_blocks(self._model)), 2, dtype=torch.int64)

            def mask(layer: int, values: torch.Tensor) -> torch.Tensor:
                is_out = left_out(layer, values) | (values == 0)
                counts[layer] += torch.tensor([int(is_out.sum()), is_out.numel()])
                return torch.where(is_out, 0, values)

            with masked_neurons(self._model, "down", mask):
                self._known[level] = window_losses(self._model, self._windows, self._scored, self._batch_size)
            self.shares[level] = tuple((counts[:, 0] / counts[:, 1]).tolist())
        return self._known[level]


def _by_cett(model: PreTrainedModel, windows: np.ndarray, batch_size: int) -> Callable[[float], LeftOut]:
    search, norms = EpsilonSearch(model, windows, "all", batch_size), _norms(model)

    def at(level: float) -> LeftOut:
        epsilons = [math.inf] * len(norms) if level == 1 else search.epsilons(level)
        return lambda layer, values: values.float().abs() * norms[layer] < epsilons[layer]

    return at


def _by_quantile(
    model: PreTrainedModel, windows: np.ndarray, batch_size: int, is_weighted: bool
) -> Callable[[float], LeftOut]:
    """Return the criterion of one cut for all layers, a quantile of |a_i| or of ||n_i|| over all of them."""
    norms = _norms(model) if is_weighted else [torch.ones(())] * len(find_blocks(model))
    sketch = Sketch()

    def see(layer: int, values: torch.Tensor) -> torch.Tensor:
        sketch.add(values.float().abs() * norms[layer])
        return values

    with masked_neurons(model, "down", see):
        window_losses(model, windows, Scored("all", windows.shape[1]), batch_size)

    def at(level: float) -> LeftOut:
        epsilon = math.inf if level == 1 else sketch.quantile(level)
        return lambda layer, values: values.float().abs() * norms[layer] < epsilon

    return at


def _by_rank(model: PreTrainedModel, _windows: np.ndarray, _batch_size: int) -> Callable[[float], LeftOut]:
    norms = _norms(model)

    def at(level: float) -> LeftOut:
        def left_out(layer: int, values: torch.Tensor) -> torch.Tensor:
            kept = round((1 - level) * values.shape[-1])
            if not kept:
                return torch.ones_like(values, dtype=torch.bool)
            return ~greatest(values.float().abs() * norms[layer], kept)

        return left_out

    return at


CRITERIA: Mapping[str, Callable[[PreTrainedModel, np.ndarray, int], Callable[[float], LeftOut]]] = {
    "cett": _by_cett,
    "universal": partial(_by_quantile, is_weighted=True),
    "fat": partial(_by_quantile, is_weighted=False),
    "topk": _by_rank,
}
"""From model, windows and batch size to what is left out at c."""


def _check(percent: float, criterion: str) -> None:
    if not percent >= 0:
        raise UserError(f"perplexity may grow by 0 % or more, found {percent:g}")
    if criterion not in CRITERIA:
        names = list(CRITERIA)
        raise UserError(
            f"there is no criterion {criterion!r}{suggest(criterion, names)}; choose among {', '.join(names)}"
        )


def _norms(model: PreTrainedModel) -> list[torch.Tensor]:
    return [block.down.matrix().float().norm(dim=0) for block in find_blocks(model)]


def _nats(losses: WindowLosses) -> float:
    return losses.perplexity().nats_per_token
