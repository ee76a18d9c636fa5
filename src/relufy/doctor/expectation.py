"""What a method may be expected to give this model: zeros, weights and bytes not read, and its source."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from relufy.activation_sparsity import Sparsifier
from relufy.doctor.patient import Patient
from relufy.engine.spec import DecoderSpec, decoder_spec
from relufy.errors import UserError
from relufy.measure.bytes_read import Packing, bytes_engine
from relufy.measure.site_weights import site_weights

Shares = Mapping[str, Sequence[float]]
"""Site -> the share of zeros, one value per layer."""


@dataclass(frozen=True)
class Expectation:
    """A method on this model. Shares are None where they cannot be told, and `source` says how they were."""

    method: str
    neuron_zeros: float | None
    weights_unread: float
    """Of the blocks' linear weights (model_level_sparsity)."""
    bytes_saved: float | None
    """Of bytes_engine a token at half a window of context, f32."""
    perplexity_rise: float | None
    """As a share, where it was measured here; None says that it takes a fine-tune to know."""
    takes: str
    """What it costs to get there."""
    source: str
    command: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def weights_unread(patient: Patient, shares: Shares) -> float:
    """Return the share of the blocks' weights that zeros leave unread; rows of a gated up by neuron."""
    unread = total = 0.0
    for block in patient.blocks:
        weights = site_weights(block)
        total += sum(weights.values())
        for site, count in weights.items():
            by = "neuron" if site == "down" or (site == "up" and block.gate is not None) else site
            own = shares.get(site, (0.0,) * len(patient.blocks))[block.index]
            unread += count * max(own, shares.get(by, (0.0,) * len(patient.blocks))[block.index])
    return unread / total


def bytes_saved(patient: Patient, shares: Shares, masked: Sequence[str] = ()) -> float | None:
    """Return the share of `bytes_engine` that zeros save, None where the engine does not run the model.

    Zeros of `neuron` are a ReLU's; those of the `masked` sites are a mask's at each.
    """
    try:
        spec = decoder_spec(patient.config)
        found = bytes_engine(_with(spec, shares, masked), shares, patient.test.shape[1] // 2, Packing())
    except UserError:
        return None
    return 1 - found.sparse / found.dense


def _with(spec: DecoderSpec, shares: Shares, masked: Sequence[str]) -> DecoderSpec:
    masks = {site: Sparsifier((site,), "threshold", threshold=0.1) for site in masked}
    layers = []
    for layer in spec.layers:
        activation = "relu" if "neuron" in shares and not layer.has_sparse_neurons else layer.activation
        layers.append(replace(layer, activation=activation, masks=dict(layer.masks) | masks))
    return replace(spec, layers=tuple(layers))
