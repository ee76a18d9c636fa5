"""Choosing masks at an exchange rate: nats for seconds, or for bytes.

An entry is left out where what that costs, `score^2 / 2` nats, is less than the exchange rate times what
reading it takes. So one number decides every threshold of every layer, and each option either pays as a
whole (against the stream of rows that an unmasked matrix is) or is left out. Per layer of a gated MLP there
are two layouts: inputs of gate, up and down; or the neurons, which skip rows of up and of down.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from relufy.methods.budget.cost import Place
from relufy.methods.budget.options import Chosen, Factors, Option, Prices, threshold_of
from relufy.methods.setting import Found

Layout = Literal["best", "inputs", "neurons"]


@dataclass(frozen=True)
class Choice:
    """A mask, with what it should cost and save."""

    chosen: Chosen
    nats: float
    saved: float

    def gain(self, exchange: float) -> float:
        return exchange * self.saved - self.nats


@dataclass(frozen=True)
class Allocator:
    """Chooses among options by prices; `factors` correct what the options' scores say."""

    options: dict[Place, Option]
    prices: Prices
    factors: Factors
    layout: Layout = "best"

    def choose(self, exchange: float) -> list[Choice]:
        """Return the masks that pay at an exchange rate, in nats a second or a byte."""
        layers = sorted({layer for layer, _site in self.options})
        choices = [choice for layer in layers for choice in self._of_layer(layer, exchange)]
        masked = {choice.chosen.option.place for choice in choices}
        idle = (o for o in self.options.values() if o.function == "fatrelu" and o.place not in masked)
        return [*choices, *(Choice(Chosen(option, option.ways[0], 0.0), 0.0, 0.0) for option in idle)]

    def exchange_for(self, nats: float) -> float:
        """Return the exchange rate at which the masks should cost so many nats a token."""
        low, high = -60.0, 60.0
        for _ in range(40):
            middle = (low + high) / 2
            if sum(choice.nats for choice in self.choose(math.exp(middle))) <= nats:
                low = middle
            else:
                high = middle
        return math.exp(low)

    def _of_layer(self, layer: int, exchange: float) -> list[Choice]:
        options = [option for (index, _site), option in self.options.items() if index == layer]
        neuron = next((o for o in options if o.is_neuron), None)
        others = [o for o in options if not o.is_neuron]
        inputs = list(self._paying(others, exchange))
        if neuron is None or self.layout == "inputs":
            return inputs
        neurons = self._with_neurons(neuron, others, exchange)
        if self.layout == "neurons" or _gain(neurons, exchange) > _gain(inputs, exchange):
            return neurons
        return inputs

    def _with_neurons(self, neuron: Option, others: Sequence[Option], exchange: float) -> list[Choice]:
        """Return the choices where up and down are read by neuron: up's own input then saves nothing, and
        that of down only what the neurons leave."""
        found = self._one(neuron, exchange)
        if found is None:
            return list(self._paying(others, exchange))
        readers = [o for o in others if set(o.sites) - {"up", "down"}]
        choices = [found, *self._paying(readers, exchange, without=("up",))]
        down = next((o for o in others if o.sites == ("down",)), None)
        if down is not None and (more := self._one(down, exchange)) is not None:
            left = 1 - found.chosen.scores.share_below(found.chosen.threshold)
            part = left * more.chosen.scores.share_below(more.chosen.threshold)
            choices.append(Choice(more.chosen, more.nats * part, more.saved * part))
        return choices

    def _paying(
        self, options: Iterable[Option], exchange: float, without: Sequence[str] = ()
    ) -> Iterator[Choice]:
        for option in options:
            if (choice := self._one(option, exchange, without)) is not None:
                yield choice

    def _one(self, option: Option, exchange: float, without: Sequence[str] = ()) -> Choice | None:
        """Return the best way of an option, or None if none pays."""
        sites = [site for site in option.readings if site not in without]
        factor = self.factors.get(option.place, 1.0)
        threshold = threshold_of(self.prices.entry(option, sites), factor, exchange)
        choices = []
        for scores in option.ways:
            kept = 1 - scores.share_below(threshold)
            saved = sum(
                self.prices.stream(option.layer, site) - self.prices.of(option.readings[site], kept)
                for site in sites
            )
            nats = factor * scores.nats_below(threshold)
            choices.append(Choice(Chosen(option, scores, threshold), nats, saved))
        best = max(choices, key=lambda choice: choice.gain(exchange))
        return best if best.gain(exchange) > 0 else None


def as_found(masks: Iterable[Chosen]) -> Found:
    """Return masks as sparsifiers and tensors."""
    masks = list(masks)
    tensors = {key: tensor for mask in masks for key, tensor in mask.tensors().items()}
    return Found(tuple(mask.sparsifier() for mask in masks), tensors)


def _gain(choices: Iterable[Choice], exchange: float) -> float:
    return sum(choice.gain(exchange) for choice in choices)
