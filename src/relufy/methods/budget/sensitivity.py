"""How much the loss minds what is left out at each channel of each site.

Leaving out an entry x_i of a projection's input changes the loss, to second order and with the cross terms
taken to vanish, by KL = x_i^2 f_i / 2 nats. f_i = E[(dL/dx_i)^2] is the diagonal of the Fisher information
through that projection alone: gradients of -log p of tokens that the model itself draws. It is Optimal Brain
Damage (LeCun et al., 1989) for activations, and one scale for all sites and layers. The score
sqrt(f_i) |x_i - c_i| has WINA's form (arXiv 2505.19427), with what the loss minds in place of the norm of the
column; at `neuron` it has CHESS's.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from relufy.measure.sketch import Sketch
from relufy.methods.budget.clock import Clock
from relufy.methods.budget.cost import Place
from relufy.methods.calibrate import Probe, collect
from relufy.methods.setting import Setting

BATCH = 2
"""Windows of a backward pass."""
FLOOR = 0.03
"""What a channel is minded at least, as a share of its site's mean: rare channels are seen too seldom."""


@dataclass(frozen=True)
class Scores:
    """One way of scoring a site's entries: `weight * |x - centre|`, whose square is twice the nats that
    leaving the entry out costs."""

    weight: torch.Tensor
    centre: torch.Tensor | None
    sketch: Sketch

    def share_below(self, threshold: float) -> float:
        edges, shares, _squares = self._curves
        return float(np.interp(threshold, edges, shares))

    def nats_below(self, threshold: float) -> float:
        """Return what leaving out all scores below a threshold costs a token."""
        edges, _shares, squares = self._curves
        return float(np.interp(threshold, edges, squares)) / 2 * len(self.weight)

    @cached_property
    def _curves(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.sketch.curves()


def score_sites(
    setting: Setting,
    windows: np.ndarray,
    places: list[Place],
    centred: set[Place],
    even: set[Place],
    seed: int,
    clock: Clock,
) -> dict[Place, list[Scores]]:
    """Return the ways of scoring each place: without a centre, and for some with the mean as one; `even`
    places have one weight for all channels."""
    fisher, means = _fisher(setting, windows, places, seed, clock), _means(setting, windows, centred)
    scores: dict[Place, list[Scores]] = {}
    probes = []
    for place in places:
        minded = fisher[place] + FLOOR * fisher[place].mean()
        if place in even:
            minded = minded.mean().expand_as(minded)
        weight = minded.sqrt().float()
        centres = [None, *([means[place]] if place in centred else [])]
        scores[place] = [Scores(weight, centre, Sketch()) for centre in centres]
        probes += [Probe(*place, _adder(way)) for way in scores[place]]
    collect(setting, windows, probes, "scoring")
    return scores


def _adder(scores: Scores) -> Callable[[torch.Tensor], None]:
    def add(x: torch.Tensor) -> None:
        distance = x.float() if scores.centre is None else x.float() - scores.centre.to(x.device)
        scores.sketch.add(scores.weight.to(x.device) * distance.abs())

    return add


def _means(setting: Setting, windows: np.ndarray, places: set[Place]) -> dict[Place, torch.Tensor]:
    totals: dict[Place, tuple[torch.Tensor | float, int]] = {place: (0.0, 0) for place in places}

    def adder(place: Place) -> Callable[[torch.Tensor], None]:
        def add(x: torch.Tensor) -> None:
            total, count = totals[place]
            totals[place] = total + x.double().sum(0), count + len(x)

        return add

    if places:
        collect(setting, windows, [Probe(*place, adder(place)) for place in sorted(places)], "means")
    return {place: (total / count).float().cpu() for place, (total, count) in totals.items()}  # type: ignore[union-attr]


def _fisher(
    setting: Setting, windows: np.ndarray, places: list[Place], seed: int, clock: Clock
) -> dict[Place, torch.Tensor]:
    """Return f of every channel, f64, by backward passes of sampled tokens; the model stays as it is."""
    squares: dict[Place, Any] = dict.fromkeys(places, 0.0)
    generator = torch.Generator(setting.model.device).manual_seed(seed)
    positions = 0
    with _differentiable(setting.model), ExitStack() as hooks:
        for place in places:
            hooks.callback(_watch_gradient(setting, place, squares).remove)
        for start in range(0, len(windows), BATCH):
            clock.check()
            ids = torch.from_numpy(windows[start : start + BATCH]).to(setting.model.device)
            logits = setting.model(input_ids=ids, use_cache=False).logits.float()
            drawn = torch.multinomial(logits.detach().softmax(-1).flatten(0, 1), 1, generator=generator)
            nn.functional.cross_entropy(logits.flatten(0, 1), drawn[:, 0], reduction="sum").backward()
            positions += ids.numel()
            setting.progress("sensitivities", min(start + BATCH, len(windows)), len(windows))
    return {place: (total / positions).cpu() for place, total in squares.items()}


def _watch_gradient(setting: Setting, place: Place, squares: dict[Place, Any]) -> Any:
    layer, site = place

    def keep(gradient: torch.Tensor) -> None:
        squares[place] = squares[place] + gradient.double().flatten(0, -2).square().sum(0)

    def at_input(_module: nn.Module, args: tuple) -> tuple:
        x = args[0].view_as(args[0])
        x.register_hook(keep)
        return (x, *args[1:])

    def at_output(_module: nn.Module, _args: tuple, output: torch.Tensor) -> None:
        output.register_hook(keep)

    block = setting.blocks[layer]
    if site == "neuron":
        return block.activation.module.register_forward_hook(at_output)
    module: nn.Module = block.projections()[site].module
    return module.register_forward_pre_hook(at_input)


@contextmanager
def _differentiable(model: PreTrainedModel) -> Iterator[None]:
    """Let gradients flow through activations alone, in eval mode; afterwards all is as before."""
    wanted = {p for p in model.parameters() if p.requires_grad}
    training = [module for module in model.modules() if module.training]
    embedding: Any = model.get_input_embeddings()
    model.requires_grad_(False)
    model.eval()
    handle = embedding.register_forward_hook(lambda _module, _args, output: output.requires_grad_())
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()
        for parameter in wanted:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
