"""What differs between the layers of a decoder: activation, masks by site, and how far attention reaches."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import NormalDist

from relufy.activation_sparsity import (
    NATIVE_ACTIVATIONS,
    RELUFY_ACT,
    SELECTIONS,
    SITES,
    ActivationSparsity,
    Predictor,
    Sparsifier,
    activation_name,
    read_activation_sparsity,
)
from relufy.engine.family import Config, Family
from relufy.engine.positions import LAYER_TYPES
from relufy.errors import UserError

ACTIVATIONS = {"silu": 0, "relu": 1, "relu2": 2, "gelu": 3, "gelu_tanh": 4, "fatrelu": 5}
"""The engine's number for each activation (csrc/kernels.h, Activation)."""
OWN_NAMES = NATIVE_ACTIVATIONS | {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""What configurations call a model's own activation."""
SPARSE_NAMES = {"relu": "relu", "relu2": "relu2", "fatrelu": "fatrelu", "drelu": "relu", "helu": "relu"}
"""The activation of the gate for each function at `neuron`. HeLU differs from ReLU in training alone."""
SELECTED_BY = ("relu", *SELECTIONS)
"""The functions of masks."""
WITH_ZEROS = ("relu", "relu2", "fatrelu")


@dataclass(frozen=True)
class LayerSpec:
    """What may differ between layers: attention's reach, the activation, and the masks by site."""

    activation: str
    shift: float = 0.0
    cutoff: float = 0.0
    has_up_relu: bool = False
    deviations: float | None = None
    masks: Mapping[str, Sparsifier] = field(default_factory=dict)
    window: int | None = None
    """The positions that a token attends to, its own among them; None is all of them."""
    rope: int | None = None
    """The table that rotates queries and keys, if they are rotated."""
    predictor: Predictor | None = None
    """What the checkpoint has to predict the active neurons with, if anything."""

    @property
    def has_sparse_neurons(self) -> bool:
        """Whether neurons can be skipped: their activation makes exact zeros, or there is a mask."""
        has_zeros = self.activation in WITH_ZEROS or self.deviations is not None
        return has_zeros or "neuron" in self.masks


def read_layers(settings: Config, family: Family, num_layers: int) -> tuple[LayerSpec, ...]:
    """Return every layer of a configuration, which has its defaults. Raises UserError for what is unknown."""
    sparsity = read_activation_sparsity(settings)
    own = family.activation or activation_name(settings)
    if family.has_up_relu and own != "relu":
        raise UserError(f"the engine runs this family with the activation relu only, found {own!r}")
    slides, rotates = _slides(settings, family, num_layers), _rotates(settings, family, num_layers)
    has_local_table = "local_theta" in family.rope
    layers = []
    for index in range(num_layers):
        layer = _layer(sparsity, own, family, index)
        window = settings.get("sliding_window") if slides[index] else None
        rope = int(slides[index] and has_local_table) if rotates[index] else None
        predictor = sparsity.predictor if sparsity.predicts(index) else None
        window = int(window) if window else None
        layers.append(replace(layer, window=window, rope=rope, predictor=predictor))
    return tuple(layers)


def _slides(settings: Config, family: Family, num_layers: int) -> list[bool]:
    """Return which layers attend to a window: as `layer_types` says, or else by a rule of the family."""
    types = settings.get("layer_types") or []
    if unknown := [kind for kind in types if kind not in LAYER_TYPES]:
        raise UserError(f"the engine can't run layers of type {unknown[0]!r} yet (layer_types)")
    if not family.has_windows or not settings.get("use_sliding_window", True):
        return [False] * num_layers
    if types:
        return [types[index] == "sliding_attention" for index in range(num_layers)]
    if "max_window_layers" in settings:
        return [index >= settings["max_window_layers"] for index in range(num_layers)]
    pattern = settings.get("sliding_window_pattern")
    return [pattern is None or (index + 1) % pattern != 0 for index in range(num_layers)]


def _rotates(settings: Config, family: Family, num_layers: int) -> list[bool]:
    """Return which layers rotate queries and keys: those of a 1 in `no_rope_layers`, or all but each nth."""
    if not family.has_unrotated_layers:
        return [family.positions == "rotary"] * num_layers
    if settings.get("no_rope_layers"):
        return [bool(settings["no_rope_layers"][index]) for index in range(num_layers)]
    return [(index + 1) % settings["no_rope_layer_interval"] != 0 for index in range(num_layers)]


def _layer(sparsity: ActivationSparsity, own: str | None, family: Family, index: int) -> LayerSpec:
    found = {site: s for site in SITES if (s := sparsity.at(site, index))}
    if not family.is_gated:
        _check_plain(found)
    neuron = found.get("neuron")
    masks = {site: s for site, s in found.items() if site != "neuron" or s.is_selection}
    for site, mask in masks.items():
        if mask.function not in SELECTED_BY:
            raise UserError(f"the engine can't mask the input of {site} by {mask.function!r}")
        if mask.rotation:
            raise UserError(f"LaRoSA's rotation has no fast path in the engine (input of {site})")
    if neuron is None or neuron.is_selection:
        return LayerSpec(_own_activation(own), has_up_relu=family.has_up_relu, masks=masks)
    if neuron.function == "statistical_topk":
        deviations = NormalDist().inv_cdf(neuron.sparsity or 0.5)
        return LayerSpec(_own_activation(own), deviations=deviations, masks=masks)
    return LayerSpec(
        activation=SPARSE_NAMES[neuron.function],
        shift=neuron.shift,
        cutoff=neuron.threshold or 0.0,
        has_up_relu=family.has_up_relu or neuron.function == "drelu",
        masks=masks,
    )


def _check_plain(found: Mapping[str, Sparsifier]) -> None:
    if "gate" in found:
        raise UserError("there is no gate in a plain MLP: the site of its first projection is 'up'")
    if "neuron" in found and "down" in found:
        raise UserError("in a plain MLP 'neuron' and 'down' are one site; set one of them")
    if "neuron" in found and found["neuron"].function == "drelu":
        raise UserError("dReLU needs a gated MLP, and this model's is plain")


def _own_activation(name: str | None) -> str:
    if name == RELUFY_ACT:
        raise UserError("config.json does not say which activation the model has of its own")
    if name not in OWN_NAMES:
        raise UserError(f"the engine has no activation {name!r}; it has {', '.join(OWN_NAMES)}")
    return OWN_NAMES[name]
