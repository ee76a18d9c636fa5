"""The masks that the automatic search can put on a model, what each saves, and what each should cost."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from relufy.activation_sparsity import SITES, Sparsifier
from relufy.errors import UserError
from relufy.measure.bytes_read import Reading
from relufy.methods.budget.clock import Clock
from relufy.methods.budget.cost import CostModel, Place
from relufy.methods.budget.sensitivity import Scores, score_sites
from relufy.methods.inputs import maskable_groups
from relufy.methods.setting import Setting
from relufy.model.configuration import find_activation_key, sparsity_of
from relufy.model.structure import BlockSites

Weighting = Literal["time", "bytes"]


@dataclass(frozen=True)
class Option:
    """One mask: at a group of sites, or at the neurons, of one layer."""

    layer: int
    sites: tuple[str, ...]
    ways: list[Scores] = field(repr=False)
    readings: dict[str, Reading] = field(repr=False)
    """How the projections that profit are read behind the mask, all of it; by site."""
    function: Literal["threshold", "fatrelu"] = "threshold"
    """A model's own ReLU can only become a FATReLU, with one threshold for a layer."""
    least: float = 0.0
    """The FATReLU's threshold that the model has already."""

    @property
    def place(self) -> Place:
        return self.layer, self.sites[0]

    @property
    def is_neuron(self) -> bool:
        return self.sites == ("neuron",)

    @property
    def channels(self) -> int:
        return len(self.ways[0].weight)


@dataclass(frozen=True)
class Prices:
    """Turns what is read into seconds or bytes."""

    costs: CostModel
    streams: dict[Place, Reading]
    weighting: Weighting

    def of(self, reading: Reading, share: float) -> float:
        """Return the price of this share of a matrix."""
        if self.weighting == "bytes":
            return reading.bytes * share
        speeds = self.costs.speeds
        share = speeds.read_share(reading.how, share)
        return speeds.seconds(reading.how, reading.bytes * share, share)

    def stream(self, layer: int, site: str) -> float:
        return self.of(self.streams[layer, site], 1.0)

    def entry(self, option: Option, sites: Sequence[str]) -> float:
        """Return what one entry that is not read saves."""
        speeds, total = self.costs.speeds, 0.0
        for site in sites:
            reading = option.readings[site]
            is_bytes = self.weighting == "bytes"
            total += reading.bytes if is_bytes else speeds.seconds(reading.how, reading.bytes, 0.5)
        return total / option.channels


def find_options(
    setting: Setting, costs: CostModel, seed: int, clock: Clock, may_centre: bool = True
) -> dict[Place, Option]:
    """Return every mask that the model can have, with its scores from the calibration text."""
    assert setting.windows is not None
    drafts = [draft for block in setting.blocks for draft in _drafts(setting, block, costs)]
    places = [draft.place for draft in drafts]
    can_centre = may_centre and _can_have_centres(setting)
    centred = {d.place for d in drafts if can_centre and not d.is_neuron}
    even = {draft.place for draft in drafts if draft.function == "fatrelu"}
    scores = score_sites(setting, setting.windows, places, centred, even, seed, clock)
    return {draft.place: replace(draft, ways=scores[draft.place]) for draft in drafts}


def _drafts(setting: Setting, block: BlockSites, costs: CostModel) -> list[Option]:
    """Return the options of a block, without scores."""
    present = sparsity_of(setting.model)
    taken = {site for site in SITES if present.at(site, block.index)}
    own = present.at("neuron", block.index)
    groups = [group for group in maskable_groups(setting, block) if not taken & set(group)]
    drafts = []
    for group in groups:
        masked = costs.matrices(Sparsifier(group, "threshold", threshold=1.0))
        profit = {site: masked[block.index, site] for site in group if not (own and site == "up")}
        if profit:
            drafts.append(Option(block.index, group, [], profit))
    return [*drafts, *_neuron_draft(block, own, costs)]


def _neuron_draft(block: BlockSites, own: Sparsifier | None, costs: CostModel) -> Iterator[Option]:
    if own is None and block.gate is not None:
        skipped = costs.matrices(Sparsifier(("neuron",), "threshold", threshold=1.0))
        profit = {site: skipped[block.index, site] for site in ("up", "down")}
        yield Option(block.index, ("neuron",), [], profit)
    elif own is not None and own.function in ("relu", "fatrelu") and not own.shift:
        found = {site: reading for (layer, site), reading in costs.streams().items() if layer == block.index}
        profit = {site: found[site] for site in ("up", "down") if found[site].how != "stream"}
        yield Option(block.index, ("neuron",), [], profit, "fatrelu", own.threshold or 0.0)


def _can_have_centres(setting: Setting) -> bool:
    """A centre changes the name of the activation in the configuration, which not every family has."""
    try:
        find_activation_key(setting.model, [block.activation.name for block in setting.blocks])
    except UserError:
        return False
    return True


@dataclass(frozen=True)
class Chosen:
    """An option with a threshold on its score."""

    option: Option
    scores: Scores
    threshold: float

    def sparsifier(self) -> Sparsifier:
        if self.option.function == "fatrelu":
            threshold = max(self.threshold / self._scale, self.option.least)
            return Sparsifier(("neuron",), "fatrelu", threshold=threshold, layers=(self.option.layer,))
        has_centre = self.scores.centre is not None
        return Sparsifier(
            self.option.sites,
            "threshold",
            threshold=self.threshold / self._scale,
            per_channel=("weight", "centre") if has_centre else ("weight",),
            layers=(self.option.layer,),
        )

    def tensors(self) -> dict[tuple[int, str, str], torch.Tensor]:
        if self.option.function == "fatrelu":
            return {}
        found = {(*self.option.place, "weight"): self.scores.weight / self._scale}
        if self.scores.centre is not None:
            found[(*self.option.place, "centre")] = self.scores.centre
        return found

    def moved(self, factor: float) -> "Chosen":
        """Return the same with another threshold."""
        return Chosen(self.option, self.scores, self.threshold * factor)

    @property
    def _scale(self) -> float:
        return float(self.scores.weight.max()) or 1.0


def threshold_of(price: float, nats_factor: float, exchange: float) -> float:
    """Return the score at which what an entry costs equals what it saves, at so many nats a price."""
    return math.sqrt(2 * exchange * price / nats_factor)


Factors = Mapping[Place, float]
"""By how much an option costs more nats than its scores say."""
