"""CETT: how many neurons a layer could do without at a given error (ReLU2 Wins, arXiv 2402.03804; Sparsing
Law, arXiv 2411.02335).

A neuron's contribution is n_i = a_i W_down[:, i]. Left out are those with ||n_i|| < epsilon; the error that
this makes is CETT = ||sum of them|| / ||sum of all||. Each layer gets the greatest epsilon whose mean error
over tokens is within the target; biases, a folded centre among them, belong to no neuron. It needs every
a_i, so it says what would be possible, not what is fast.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from relufy.errors import UserError
from relufy.measure.modes import Scored, window_losses
from relufy.measure.sketch import Sketch
from relufy.model.selections import Selection
from relufy.model.structure import BlockSites, Projection, find_blocks

CETT_TARGET = 0.2
OCTAVES = 30
"""How far below the greatest norm of a layer the search begins."""
SECTIONS = 16
"""Each pass over the text narrows all layers' epsilon to one of so many sections."""
PRECISION = 0.006
"""How far apart, relatively, the two ends of the search are at last; three passes from OCTAVES reach it."""


@dataclass(frozen=True)
class CettSparsity:
    """The share of neurons that can be left out, by layer, the norm that they are below, and the error."""

    target: float
    sparsity: tuple[float, ...]
    epsilon: tuple[float, ...]
    error: tuple[float, ...]
    error_p95: tuple[float, ...]
    """Of tokens: the mean hides those that lose most."""
    tokens: int

    @property
    def mean(self) -> float:
        return sum(self.sparsity) / len(self.sparsity)


def truncate_tail(
    activations: torch.Tensor, weight: torch.Tensor, epsilon: float, whole: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return CETT and the share of neurons left out, `[tokens]` each, at a norm.

    `activations` are `[tokens, neurons]`, `weight` is down's, `[out, neurons]`; `whole` is the norm of each
    token's output, where it is known. A token without any output has an error of 0.
    """
    is_left_out = activations.abs() * weight.norm(dim=0) < epsilon
    tail = (activations * is_left_out) @ weight.T
    whole = (activations @ weight.T).norm(dim=-1) if whole is None else whole
    error = torch.where(whole > 0, tail.norm(dim=-1) / whole, torch.zeros_like(whole))
    return error, is_left_out.float().mean(-1)


class EpsilonSearch:
    """Finds each layer's epsilon for targets, over windows: int64 `[windows, length]`.

    Errors grow with epsilon, so what was found for a target below and one above bounds what lies between.
    """

    def __init__(
        self, model: PreTrainedModel, windows: np.ndarray, mode: str = "all", batch_size: int = 16
    ) -> None:
        self._model, self._windows, self._batch_size = model, windows, batch_size
        self._scored = Scored(mode, windows.shape[1])
        self._layers = [_Layer(block.down) for block in find_blocks(model)]
        self._run(_Layer.find_greatest)
        self._found = {0.0: [layer.low for layer in self._layers]}
        self._found[1.0] = [layer.high for layer in self._layers]

    def epsilons(self, target: float) -> list[float]:
        """Return the greatest epsilon of each layer whose mean error is at most the target, within 0.5 %."""
        if target not in self._found:
            lows = self._found[max(known for known in self._found if known < target)]
            highs = self._found[min(known for known in self._found if known > target)]
            for layer, low, high in zip(self._layers, lows, highs, strict=True):
                layer.low, layer.high = low, high
            while any(layer.is_wide() for layer in self._layers):
                self._narrow(target)
            self._found[target] = [layer.low for layer in self._layers]
        return self._found[target]

    def result(self, target: float) -> CettSparsity:
        """Return what the epsilons of a target leave out."""
        epsilons = self.epsilons(target)
        for layer, epsilon in zip(self._layers, epsilons, strict=True):
            layer.settle(epsilon)
        self._run(_Layer.try_all)
        results = [layer.result(target) for layer in self._layers]
        sparsity, epsilon, error, error_p95 = zip(*results, strict=True)
        return CettSparsity(target, sparsity, epsilon, error, error_p95, self._layers[0].tokens)

    def _narrow(self, target: float) -> None:
        for layer in self._layers:
            layer.divide()
        self._run(_Layer.try_all)
        for layer in self._layers:
            layer.narrow(target)

    def _run(self, observe: "Observe") -> None:
        with _watching(self._model, self._layers, self._scored, observe):
            window_losses(self._model, self._windows, self._scored, self._batch_size)


def cett_sparsity(
    model: PreTrainedModel,
    windows: np.ndarray,
    mode: str = "all",
    target: float = CETT_TARGET,
    batch_size: int = 16,
) -> CettSparsity:
    """Return each layer's share of neurons whose removal costs `target` at most, over windows.

    int64 `[windows, length]`; they are run five times, and nothing of them is kept. Raises UserError for a
    target outside (0, 1).
    """
    if not 0 < target < 1:
        raise UserError(f"a CETT target lies between 0 and 1, found {target}")
    return EpsilonSearch(model, windows, mode, batch_size).result(target)


def cett_at(
    model: PreTrainedModel,
    windows: np.ndarray,
    epsilons: Sequence[float],
    mode: str = "all",
    batch_size: int = 16,
) -> tuple[np.ndarray, np.ndarray]:
    """Return CETT and the share of neurons below norms, the same for all layers: `[layers, norms]` each.

    Means over the tokens of windows, int64 `[windows, length]`, which are run once.
    """
    scored = Scored(mode, windows.shape[1])
    layers = [_Layer(block.down) for block in find_blocks(model)]
    for layer in layers:
        layer.choose(epsilons)
    with _watching(model, layers, scored, _Layer.try_all):
        window_losses(model, windows, scored, batch_size)
    errors, shares = zip(*(layer.means() for layer in layers), strict=True)
    return np.stack(errors), np.stack(shares)


class _Layer:
    """One layer's search: epsilon lies between `low`, whose error is within the target, and `high`."""

    def __init__(self, down: Projection) -> None:
        self._weight = down.matrix().float()
        self._norms = self._weight.norm(dim=0)
        self.low = self.high = 0.0
        self._tried: list[float] = []
        self._error = self._share = torch.zeros(0)
        self._errors: Sketch | None = None
        self.tokens = 0

    def find_greatest(self, activations: torch.Tensor) -> None:
        self.high = max(self.high, 1.01 * float((activations.abs() * self._norms).max()))
        self.low = self.high * 2.0**-OCTAVES

    def is_wide(self) -> bool:
        return self.high > (1 + PRECISION) * self.low

    def divide(self) -> None:
        is_wide = self.is_wide()
        self._try(np.geomspace(self.low, self.high, SECTIONS + 1)[1:-1].tolist() if is_wide else [])

    def settle(self, epsilon: float) -> None:
        """Try one epsilon, and keep the distribution of its errors."""
        self._try([epsilon])
        self._errors = Sketch()

    def choose(self, epsilons: Sequence[float]) -> None:
        self._try(list(epsilons))

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the errors and the shares at what was tried."""
        return self._error.numpy() / self.tokens, self._share.numpy() / self.tokens

    def try_all(self, activations: torch.Tensor) -> None:
        self.tokens += len(activations)
        whole = (activations @ self._weight.T).norm(dim=-1)
        for index, epsilon in enumerate(self._tried):
            error, share = truncate_tail(activations, self._weight, epsilon, whole)
            self._error[index] += error.double().sum().cpu()
            self._share[index] += share.double().sum().cpu()
            if self._errors is not None:
                self._errors.add(error)

    def narrow(self, target: float) -> None:
        """Go to the section at whose end the error first passes the target."""
        edges = [self.low, *self._tried, self.high]
        passes = (self._error / self.tokens <= target).tolist()
        first = passes.index(False) if False in passes else len(passes)
        if self._tried:
            self.low, self.high = edges[first], edges[first + 1]

    def result(self, target: float) -> tuple[float, float, float, float]:
        """Return the share left out, epsilon, the error and its 95th percentile over tokens; a layer without
        any output needs no neuron."""
        (epsilon,), errors = self._tried, self._errors
        assert errors is not None
        if not epsilon:
            return 1.0, 0.0, 0.0, 0.0
        error, share = (float(sums[0]) / self.tokens for sums in (self._error, self._share))
        is_within = error <= target
        return (share, epsilon, error, errors.quantile(0.95)) if is_within else (0.0, 0.0, 0.0, 0.0)

    def _try(self, epsilons: list[float]) -> None:
        self._tried, self.tokens, self._errors = epsilons, 0, None
        self._error, self._share = torch.zeros(2, len(epsilons), dtype=torch.float64)


Observe = Callable[[_Layer, torch.Tensor], None]


@contextmanager
def _watching(
    model: PreTrainedModel,
    layers: list[_Layer],
    scored: Scored,
    observe: Callable[[_Layer, torch.Tensor], None],
) -> Iterator[None]:
    """Show what each down projection reads, behind its mask, at the tokens that count."""
    with ExitStack() as hooks:
        for layer, block in zip(layers, find_blocks(model), strict=True):
            hooks.callback(_attach(block, scored, partial(observe, layer)).remove)
        yield


def _attach(block: BlockSites, scored: Scored, show: Callable[[torch.Tensor], None]) -> Any:
    module = block.down.module
    mask: Any = getattr(module, "sparsifier", None)

    def see(values: torch.Tensor, centre: torch.Tensor | None = None) -> None:
        rows = scored.split(values, 1)[1].flatten(0, 1).float()
        if len(rows):
            show(rows if centre is None else rows - centre)

    def see_masked(_module: nn.Module, _args: tuple, output: torch.Tensor) -> None:
        see(output, mask.centre)

    def see_input(_module: nn.Module, args: tuple) -> None:
        see(args[0])

    if isinstance(mask, Selection):
        return mask.register_forward_hook(see_masked)
    return module.register_forward_pre_hook(see_input)
