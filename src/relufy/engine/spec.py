"""The canonical decoder as data: what a config.json says, in the words of the engine.

RMSNorm or LayerNorm, rotary or learned positions, grouped-query attention, a gated or plain MLP, biases, a
tied or untied head, and masks at any site. What a configuration asks for beyond that is refused by name;
nothing is ignored.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

from relufy.activation_sparsity import (
    NATIVE_ACTIVATIONS,
    RELUFY_ACT,
    SELECTIONS,
    SITES,
    ActivationSparsity,
    Sparsifier,
    activation_name,
    read_activation_sparsity,
)
from relufy.engine.families import FAMILIES, Family
from relufy.engine.positions import rope_frequencies
from relufy.errors import UserError

ACTIVATIONS = {"silu": 0, "relu": 1, "relu2": 2, "gelu": 3, "gelu_tanh": 4, "fatrelu": 5}
"""The engine's number for each activation (csrc/kernels.h, Activation)."""
OWN_NAMES = NATIVE_ACTIVATIONS | {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""What configurations call a model's own activation."""
SPARSE_NAMES = {"relu": "relu", "relu2": "relu2", "fatrelu": "fatrelu", "drelu": "relu", "helu": "relu"}
"""The activation of the gate for each function at `neuron`. HeLU differs from ReLU in training alone."""
SELECTED_BY = ("relu", *SELECTIONS)
"""The functions of masks."""
WITH_ZEROS = ("relu", "relu2", "fatrelu")

MAX_CONTEXT = 1 << 31


@dataclass(frozen=True)
class LayerSpec:
    """What may differ between layers: the activation, and the masks by site."""

    activation: str
    shift: float = 0.0
    cutoff: float = 0.0
    has_up_relu: bool = False
    deviations: float | None = None
    masks: Mapping[str, Sparsifier] = field(default_factory=dict)

    def shares_mask(self, sites: tuple[str, ...]) -> bool:
        """Tell whether one mask serves these projections, and so sits where their input is made."""
        masks = [self.masks.get(site) for site in sites]
        return (
            bool(masks)
            and masks[0] is not None
            and all(m is masks[0] for m in masks)
            and not masks[0].correction
        )

    @property
    def has_sparse_neurons(self) -> bool:
        """Whether neurons can be skipped: their activation makes exact zeros, or there is a mask."""
        has_zeros = self.activation in WITH_ZEROS or self.deviations is not None
        return has_zeros or "neuron" in self.masks


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder that the engine can run. Widths are in elements; `biased` names the matrices with a bias."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    norm_eps: float
    tied_head: bool
    biased: frozenset[str]
    rope_frequencies: tuple[float, ...]
    layers: tuple[LayerSpec, ...]

    def is_sparse(self) -> bool:
        return any(layer.has_sparse_neurons or layer.masks for layer in self.layers)

    def readers(self, site: str) -> tuple[str, ...]:
        """Return the projections that read the same norm's output as this one, or none."""
        inputs = (("q", "k", "v"), ("gate", "up") if self.family.is_gated else ("up",))
        return next((sites for sites in inputs if site in sites), ())

    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """Return (outputs, inputs) of a layer's matrices."""
        hidden, neurons = self.hidden_size, self.intermediate_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
        gate = {"gate": (neurons, hidden)} if self.family.is_gated else {}
        return shapes | gate | {"up": (neurons, hidden), "down": (hidden, neurons)}


def decoder_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a config.json. Raises UserError, naming what the engine lacks, if it can't be run."""
    name = config.get("model_type")
    if name not in FAMILIES:
        raise UserError(f"the engine can't run models of type {name!r} yet; it runs {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    _check_settings(config, name, family)
    try:
        spec = _decoder_spec(config, family)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"config.json does not describe a {name} model: {error!r}") from None
    _check_sizes(spec)
    _check_selections(spec)
    return spec


def _check_settings(config: Mapping[str, Any], name: str, family: Family) -> None:
    for key, must in family.must.items():
        value = config.get(key, must.default)
        if bool(value) != bool(must.be):
            raise UserError(f"the engine can't run this {name} model yet: it has {key}={value}")
    for key, other in family.equal_sizes:
        if config.get(key) not in (None, config.get(other)):
            raise UserError(
                f"the engine can't run this {name} model yet: it has {key}={config[key]}, "
                f"and {other}={config.get(other)}"
            )


def _decoder_spec(config: Mapping[str, Any], family: Family) -> DecoderSpec:
    values = dict(family.defaults) | {
        name: config[key] for name, key in family.keys.items() if config.get(key) is not None
    }
    hidden_size, num_heads = int(values["hidden_size"]), int(values["num_heads"])
    num_layers = int(values["num_layers"])
    head_dim = int(values.get("head_dim") or hidden_size // num_heads)
    is_rotary = family.positions == "rotary"
    return DecoderSpec(
        family=family,
        vocab_size=int(values["vocab_size"]),
        hidden_size=hidden_size,
        intermediate_size=int(values["intermediate_size"]),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=int(values.get("num_kv_heads") or num_heads),
        head_dim=head_dim,
        max_context=int(values["max_context"]),
        norm_eps=float(values["norm_eps"]),
        tied_head=bool(values["tied_head"]),
        biased=frozenset(
            matrix
            for matrices, (key, default) in family.biases.items()
            if config.get(key, default)
            for matrix in matrices
        ),
        rope_frequencies=rope_frequencies(config, head_dim) if is_rotary else (),
        layers=_layers(config, family, num_layers),
    )


def _check_sizes(spec: DecoderSpec) -> None:
    numbers = {n: v for n, v in vars(spec).items() if isinstance(v, int | float) and not isinstance(v, bool)}
    if wrong := [name for name, value in numbers.items() if value <= 0]:
        raise UserError(f"config.json: {wrong[0]} is {numbers[wrong[0]]}, which can't be right")
    if spec.max_context > MAX_CONTEXT:
        raise UserError(f"config.json: a context of {spec.max_context} positions can't be right")
    if spec.head_dim % 2 or spec.num_heads % spec.num_kv_heads:
        raise UserError(
            f"config.json: {spec.num_heads} heads of {spec.head_dim} over {spec.num_kv_heads} can't be right"
        )


def _check_selections(spec: DecoderSpec) -> None:
    shapes = spec.matrix_shapes()
    for layer in spec.layers:
        for site, mask in layer.masks.items():
            channels = spec.intermediate_size if site == "neuron" else shapes[site][1]
            if (mask.k or 0) > channels:
                raise UserError(f"a top-k at {site} keeps {mask.k} entries of {channels}; lower k")


def _layers(config: Mapping[str, Any], family: Family, num_layers: int) -> tuple[LayerSpec, ...]:
    sparsity = read_activation_sparsity(config)
    own = activation_name(config) or family.defaults["activation"]
    return tuple(_layer(sparsity, own, family, index) for index in range(num_layers))


def _layer(sparsity: ActivationSparsity, own: str, family: Family, index: int) -> LayerSpec:
    found = {site: s for site in SITES if (s := sparsity.at(site, index))}
    if not family.is_gated:
        _check_plain(found)
    neuron = found.get("neuron")
    masks = {site: s for site, s in found.items() if site != "neuron" or s.is_selection}
    for site, mask in masks.items():
        if mask.function not in SELECTED_BY:
            raise UserError(f"the engine can't mask the input of {site} by {mask.function!r}")
    if neuron is None or neuron.is_selection:
        return LayerSpec(activation=_own_activation(own), masks=masks)
    if neuron.function == "statistical_topk":
        deviations = NormalDist().inv_cdf(neuron.sparsity or 0.5)
        return LayerSpec(activation=_own_activation(own), deviations=deviations, masks=masks)
    return LayerSpec(
        activation=SPARSE_NAMES[neuron.function],
        shift=neuron.shift,
        cutoff=neuron.threshold or 0.0,
        has_up_relu=neuron.function == "drelu",
        masks=masks,
    )


def _check_plain(found: Mapping[str, Sparsifier]) -> None:
    if "gate" in found:
        raise UserError("there is no gate in a plain MLP: the site of its first projection is 'up'")
    if "neuron" in found and "down" in found:
        raise UserError("in a plain MLP 'neuron' and 'down' are one site; set one of them")
    if "neuron" in found and found["neuron"].function == "drelu":
        raise UserError("dReLU needs a gated MLP, and this model's is plain")


def _own_activation(name: str) -> str:
    if name == RELUFY_ACT:
        raise UserError("config.json does not say which activation the model has of its own")
    if name not in OWN_NAMES:
        raise UserError(f"the engine has no activation {name!r}; it has {', '.join(OWN_NAMES)}")
    return OWN_NAMES[name]
