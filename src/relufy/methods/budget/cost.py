"""What a token costs the engine with some masks: bytes, and the time that reading them takes here."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from transformers import PreTrainedModel

from relufy.activation_sparsity import BLOCK_KEY, ActivationSparsity, Sparsifier
from relufy.engine.spec import DecoderSpec, decoder_spec
from relufy.measure.bytes_read import Packing, Reading, readings
from relufy.measure.cost import Sparsity
from relufy.methods.budget.speed import ReadingSpeeds
from relufy.methods.setting import Found
from relufy.methods.sparsify import kept_activations
from relufy.model.configuration import sparsity_of

Place = tuple[int, str]
"""A layer and a site."""


@dataclass(frozen=True)
class Shares:
    """The share of entries that pass a mask, by layer and site: `listed` on the mean, and `read` by the
    engine, which reads all where a token needs more than the crossover."""

    listed: Mapping[Place, float]
    read: Mapping[Place, float]


@dataclass(frozen=True)
class Cost:
    """Of one token. `bytes` is `bytes_engine` of `relufy measure`; `seconds` is predicted."""

    bytes: float
    seconds: float

    def saved(self, dense: "Cost") -> "Cost":
        """Return the shares of the dense cost that are saved."""
        return Cost(1 - self.bytes / dense.bytes, 1 - self.seconds / dense.seconds)


@dataclass(frozen=True)
class CostModel:
    """The engine's account of a model's bytes, and this machine's speeds."""

    model: PreTrainedModel
    speeds: ReadingSpeeds
    context: int
    dtype: str = "f32"

    @cached_property
    def dense(self) -> Cost:
        """The model as it is, without new masks."""
        return self.cost(Found(()), Shares({}, {}))

    def cost(self, found: Found, shares: Shares) -> Cost:
        """Return what a token costs with what a method found, where such shares pass its masks."""
        spec, packing = self.spec(found), self._packing(found)
        read = list(readings(spec, self._sparsity(spec, shares.read), self.context, packing))
        listed = readings(spec, self._sparsity(spec, shares.listed), self.context, packing)
        seconds = sum(self.speeds.seconds(r.how, r.bytes, r.share) for r in read)
        return Cost(sum(r.bytes for r in listed), seconds)

    def spec(self, found: Found) -> DecoderSpec:
        """Return the decoder with what was found. Raises UserError if the engine does not run it."""
        present = sparsity_of(self.model)
        sparsifiers = (*kept_activations(present.sparsifiers, found.sparsifiers), *found.sparsifiers)
        config = self.model.config.to_dict()
        if sparsifiers:
            block = ActivationSparsity(sparsifiers, activation=present.activation).to_block()
            config |= {BLOCK_KEY: block}
        return decoder_spec(config)

    def matrices(self, sparsifier: Sparsifier) -> dict[Place, Reading]:
        """Return how each projection is read where this sparsifier is everywhere and nothing is zero."""
        found = readings(self.spec(Found((sparsifier,))), {}, self.context, Packing(self.dtype))
        return {(r.layer, r.site): r for r in found if r.layer is not None}

    def streams(self) -> dict[Place, Reading]:
        """Return how each projection is read as it is, if nothing is zero."""
        found = readings(self.spec(Found(())), {}, self.context, Packing(self.dtype))
        return {(r.layer, r.site): r for r in found if r.layer is not None}

    def _packing(self, found: Found) -> Packing:
        ranks = {
            (layer, site): tensor.shape[0]
            for sparsifier in found.sparsifiers
            if sparsifier.correction
            for (layer, first, name), tensor in found.tensors.items()
            if name == "low_rank_in" and first in sparsifier.sites and sparsifier.applies_to(layer)
            for site in sparsifier.sites
        }
        return replace(Packing(self.dtype), ranks=ranks)

    def _sparsity(self, spec: DecoderSpec, shares: Mapping[Place, float]) -> Sparsity:
        """Return zeros by site and layer; `down` has those of `neuron` where it has no mask of its own."""
        sites = Counter(site for _layer, site in shares)
        if "neuron" in sites:
            sites["down"] += 1
        return {site: [1 - _share(shares, layer, site) for layer in range(spec.num_layers)] for site in sites}


def _share(shares: Mapping[Place, float], layer: int, site: str) -> float:
    substitute = shares.get((layer, "neuron"), 1.0) if site == "down" else 1.0
    return shares.get((layer, site), substitute)
