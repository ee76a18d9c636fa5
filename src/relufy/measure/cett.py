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
from relufy.model.selections import Selection
from relufy.model.structure import BlockSites, Projection, find_blocks

CETT_TARGET = 0.2
OCTAVES = 30
"""How far below the greatest norm of a layer the search begins."""
SECTIONS, ROUNDS = 16, 3
"""Each pass over the text narrows all layers' epsilon to one of so many sections: to 0.5 % in the end."""


@dataclass(frozen=True)
class CettSparsity:
    """The share of neurons that can be left out, by layer, the norm that they are below, and the error."""

    target: float
    sparsity: tuple[float, ...]
    epsilon: tuple[float, ...]
    error: tuple[float, ...]
    tokens: int

    @property
    def mean(self) -> float:
        return sum(self.sparsity) / len(self.sparsity)


def truncate_tail(
    activations: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return CETT and the share of neurons left out, `[tokens]` each, at a norm.

    `activations` are `[tokens, neurons]`, `weight` is down's, `[out, neurons]`. A token without any output
    has an error of 0.
    """
    is_left_out = activations.abs() * weight.norm(dim=0) < epsilon
    tail = (activations * is_left_out) @ weight.T
    whole = (activations @ weight.T).norm(dim=-1)
    error = torch.where(whole > 0, tail.norm(dim=-1) / whole, torch.zeros_like(whole))
    return error, is_left_out.float().mean(-1)


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
    scored = Scored(mode, windows.shape[1])
    layers = [_Layer(block.down, target) for block in find_blocks(model)]

    def run(observe: Observe) -> None:
        with _watching(model, layers, scored, observe):
            window_losses(model, windows, scored, batch_size)

    run(_Layer.find_greatest)
    for _ in range(ROUNDS):
        for layer in layers:
            layer.divide()
        run(_Layer.try_all)
        for layer in layers:
            layer.narrow()
    for layer in layers:
        layer.settle()
    run(_Layer.try_all)
    results = [layer.result() for layer in layers]
    sparsity, epsilon, error = zip(*results, strict=True)
    return CettSparsity(target, sparsity, epsilon, error, layers[0].tokens)


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
    layers = [_Layer(block.down, CETT_TARGET) for block in find_blocks(model)]
    for layer in layers:
        layer.choose(epsilons)
    with _watching(model, layers, scored, _Layer.try_all):
        window_losses(model, windows, scored, batch_size)
    errors, shares = zip(*(layer.means() for layer in layers), strict=True)
    return np.stack(errors), np.stack(shares)


class _Layer:
    """One layer's search: epsilon lies between `low`, whose error is within the target, and `high`."""

    def __init__(self, down: Projection, target: float) -> None:
        self._weight, self._target = down.matrix().float(), target
        self._norms = self._weight.norm(dim=0)
        self.low = self.high = 0.0
        self._tried: list[float] = []
        self._error = self._share = torch.zeros(0)
        self.tokens = 0

    def find_greatest(self, activations: torch.Tensor) -> None:
        self.high = max(self.high, 1.01 * float((activations.abs() * self._norms).max()))
        self.low = self.high * 2.0**-OCTAVES

    def divide(self) -> None:
        self._try(np.geomspace(self.low, self.high, SECTIONS + 1)[1:-1].tolist() if self.high else [])

    def settle(self) -> None:
        self._try([self.low])

    def choose(self, epsilons: Sequence[float]) -> None:
        self._try(list(epsilons))

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the errors and the shares at what was tried."""
        return self._error.numpy() / self.tokens, self._share.numpy() / self.tokens

    def try_all(self, activations: torch.Tensor) -> None:
        self.tokens += len(activations)
        for index, epsilon in enumerate(self._tried):
            error, share = truncate_tail(activations, self._weight, epsilon)
            self._error[index] += error.double().sum().cpu()
            self._share[index] += share.double().sum().cpu()

    def narrow(self) -> None:
        """Go to the section at whose end the error first passes the target."""
        edges = [self.low, *self._tried, self.high]
        passes = (self._error / self.tokens <= self._target).tolist()
        first = passes.index(False) if False in passes else len(passes)
        if self._tried:
            self.low, self.high = edges[first], edges[first + 1]

    def result(self) -> tuple[float, float, float]:
        """Return the share left out, epsilon and the error; a layer without any output needs no neuron."""
        if not self.high:
            return 1.0, 0.0, 0.0
        error, share = (float(sums[0]) / self.tokens for sums in (self._error, self._share))
        return (share, self.low, error) if error <= self._target else (0.0, 0.0, 0.0)

    def _try(self, epsilons: list[float]) -> None:
        self._tried, self.tokens = epsilons, 0
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
