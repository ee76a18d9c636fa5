"""The `activation_sparsity` block of a checkpoint's config.json: which sites get zeros, and by which
function.

This is where the torch side and the engine meet: both read it, neither imports the other. The block of a
relufied Llama, stage 2:

    {"version": 1,
     "sparsifiers": [{"sites": ["neuron"], "function": "relu"},
                     {"sites": ["q", "k", "v"], "function": "relu"},
                     {"sites": ["gate", "up"], "function": "relu"}],
     "recipe": {...},
     "provenance": {"base": "...", ...}}

Models that are sparse by nature (their activation makes exact zeros) need no block.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from relufy.errors import UserError
from relufy.schema import from_mapping, suggest, to_mapping

BLOCK_KEY = "activation_sparsity"
BLOCK_VERSION = 1

SITES = ("q", "k", "v", "o", "gate", "up", "down", "neuron")
"""Inputs of the seven projections, and the activation function's output (`neuron`)."""

ACTIVATIONS = ("relu", "relu2", "fatrelu", "drelu", "helu", "statistical_topk")
"""Functions of the pre-activation, with exact zeros. `relu2` is the squared ReLU."""

INPUT_ACTIVATIONS = ("relu", "relu2")
"""The activations that may also stand at the input of projections."""

SELECTIONS = ("threshold", "topk")
"""Functions that keep some entries as they are."""

PER_CHANNEL = ("threshold", "weight", "centre")
"""What a selection may take from tensors of the checkpoint, one value per channel."""

LOW_RANK = "low_rank"

ROTATED_SITES = ("q", "k", "v", "gate", "up")
"""The sites whose input may be rotated before a selection: those that read a hidden state."""

ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function", "activation")
"""The names that Hugging Face configurations give their MLP's activation."""

RELUFY_ACT = "relufy"
"""The activation name of checkpoints that stock transformers can't compute: there it fails, loudly."""

HELU_WIDTH = 0.05
"""How far below zero HeLU still lets gradients through. Language models learnt with this; 2 collapses."""

NATIVE_ACTIVATIONS = {"relu": "relu", "relu2": "relu2", "relu_squared": "relu2", "relu_2": "relu2"}
"""What configurations call the activations that are sparse by nature, and their function."""

FATRELU = "fatrelu"
FATRELU_THRESHOLD_KEY = "hidden_act_param"
"""Where ProSparse and MiniCPM-S keep FATReLU's threshold."""

PREDICTOR_KINDS = ("svd", "plain_svd", "trained", "random")
"""How predictors are made: by a singular value decomposition of the gate where the text's inputs lie, by one
of the gate alone, from the first one by training, or drawn, which is for benchmarks of speed alone."""
PREDICTOR_VERSION = 1

PREDICTABLE = ("relu", "relu2", "helu", "fatrelu", "drelu", "threshold")
"""The functions at `neuron` that decide on each neuron by itself, so that a predictor may choose some."""

_MASKS = ("relu", *SELECTIONS)
_FUNCTIONS_WITH = {
    "shift": ("relu", "relu2", "helu"),
    "width": ("helu",),
    "threshold": (FATRELU, "threshold"),
    "k": ("topk",),
    "sparsity": ("statistical_topk",),
    "per_channel": SELECTIONS,
    "correction": _MASKS,
    "rotation": SELECTIONS,
    "phase": _MASKS,
    "dense_first_tokens": _MASKS,
}
"""The functions that each field belongs to."""


@dataclass(frozen=True)
class Sparsifier:
    """One function at some sites.

    An activation at `neuron` replaces the MLP's activation: relu `max(z - shift, 0)`, relu2 its square, helu
    as relu with gradient 1 where `z - shift > -width`, fatrelu `z where z >= threshold`, drelu
    `relu(gate) * relu(up)`, statistical_topk `act(relu(z - mean(z) - std(z) * PhiInverse(sparsity)))` with
    the model's own `act`.

    A selection keeps x_i where `weight_i |x_i - centre_i| >= threshold_i` or is among the `k` greatest, ties
    going to the lower index. It acts on the input of projections or, at `neuron`, on the output of the
    model's own activation. An entry that is not kept counts as its centre, which is 0 if there is none.
    """

    sites: tuple[str, ...]
    function: str
    shift: float = 0.0
    threshold: float | None = None
    k: int | None = None
    sparsity: float | None = None
    per_channel: tuple[str, ...] = ()
    """Which of threshold, weight, centre are tensors in the checkpoint."""
    correction: str | None = None
    """"low_rank" adds `out (in (x - s(x)))` to the projection of s(x), with tensors in the checkpoint."""
    rotation: bool = False
    """Select in another basis: the projection reads `s(x Q) Q^T`, with the orthogonal Q in the checkpoint."""
    phase: str = "all"
    """"decode" leaves the tokens of the prompt as they are."""
    dense_first_tokens: int = 0
    """Tokens at positions below this stay as they are."""
    layers: tuple[int, ...] | None = None
    """The blocks it applies to; None means all of them."""
    width: float = HELU_WIDTH
    """Only training reads it: what a HeLU puts out does not depend on it."""

    def __post_init__(self) -> None:
        _check_sites(self)
        _check_function(self)
        _check_values(self)

    @property
    def is_selection(self) -> bool:
        return self.function in SELECTIONS

    def applies_to(self, layer: int) -> bool:
        return self.layers is None or layer in self.layers

    def behaves_like(self, other: "Sparsifier") -> bool:
        """Return whether both do the same, wherever they are."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in ("sites", "layers")]
        return all(getattr(self, name) == getattr(other, name) for name in names)


def _check_sites(sparsifier: Sparsifier) -> None:
    for site in sparsifier.sites:
        if site not in SITES:
            raise UserError(f"unknown site {site!r}{suggest(site, list(SITES))}")
    if not sparsifier.sites:
        raise UserError(f"a {sparsifier.function} sparsifier names no site (known: {', '.join(SITES)})")
    known = [*ACTIVATIONS, *SELECTIONS]
    if sparsifier.function not in known:
        raise UserError(f"unknown function {sparsifier.function!r}{suggest(sparsifier.function, known)}")
    inputs = [site for site in sparsifier.sites if site != "neuron"]
    if inputs and sparsifier.function not in (*INPUT_ACTIVATIONS, *SELECTIONS):
        raise UserError(
            f"{sparsifier.function} is an activation: it goes to the site 'neuron', not {inputs[0]!r}"
        )


def _check_function(sparsifier: Sparsifier) -> None:
    """Raise UserError if a field is set that the function has no use for, or one is missing."""
    function, defaults = sparsifier.function, {f.name: f.default for f in dataclasses.fields(sparsifier)}
    for name, functions in _FUNCTIONS_WITH.items():
        if getattr(sparsifier, name) != defaults[name] and function not in functions:
            raise UserError(f"{name} belongs to {', '.join(functions)}; {function} has none")
    for name in ("k", "sparsity"):
        if function in _FUNCTIONS_WITH[name] and getattr(sparsifier, name) is None:
            raise UserError(f"{function} needs {name!r}")
    is_per_channel = "threshold" in sparsifier.per_channel
    if is_per_channel and function != "threshold":
        raise UserError(f"per_channel: {function} has no thresholds; it may have 'weight' and 'centre'")
    if function in _FUNCTIONS_WITH["threshold"] and (sparsifier.threshold is None) != is_per_channel:
        options = "'threshold', or 'threshold' in per_channel" if function == "threshold" else "'threshold'"
        raise UserError(f"{function} needs {options}{', not both' if is_per_channel else ''}")


def _check_values(sparsifier: Sparsifier) -> None:
    at_neuron = "neuron" in sparsifier.sites
    if sparsifier.shift and sparsifier.sites != ("neuron",):
        raise UserError("a shift is defined for the site 'neuron' alone")
    if not math.isfinite(sparsifier.shift):
        raise UserError(f"shift must be a finite number, found {sparsifier.shift}")
    if not 0 <= sparsifier.width < math.inf:
        raise UserError(f"width must be a finite number, 0 or greater, found {sparsifier.width}")
    if sparsifier.threshold is not None and not 0 <= sparsifier.threshold < math.inf:
        raise UserError(f"threshold must be a finite number, 0 or greater, found {sparsifier.threshold}")
    if sparsifier.k is not None and sparsifier.k < 1:
        raise UserError(f"k must be at least 1, found {sparsifier.k}")
    if sparsifier.sparsity is not None and not 0 < sparsifier.sparsity < 1:
        raise UserError(f"sparsity must lie between 0 and 1, found {sparsifier.sparsity}")
    for name in sparsifier.per_channel:
        if name not in PER_CHANNEL:
            raise UserError(f"per_channel: unknown name {name!r}{suggest(name, list(PER_CHANNEL))}")
    if len(set(sparsifier.per_channel)) < len(sparsifier.per_channel):
        raise UserError(f"per_channel names a tensor twice: {', '.join(sparsifier.per_channel)}")
    if "centre" in sparsifier.per_channel and at_neuron:
        raise UserError("per_channel: there is no centre at the site 'neuron'")
    if sparsifier.correction not in (None, LOW_RANK):
        raise UserError(f"unknown correction {sparsifier.correction!r} (known: {LOW_RANK})")
    if sparsifier.correction and (at_neuron or "centre" in sparsifier.per_channel):
        raise UserError("a correction needs the input of projections, without a centre")
    if sparsifier.rotation and set(sparsifier.sites) - set(ROTATED_SITES):
        raise UserError(f"a rotation needs the input of {', '.join(ROTATED_SITES)}")
    if sparsifier.rotation and (sparsifier.per_channel or sparsifier.correction):
        raise UserError("a rotation goes with one threshold or one k, without per_channel or correction")
    if sparsifier.phase not in ("all", "decode"):
        raise UserError(f"unknown phase {sparsifier.phase!r} (known: all, decode)")
    if sparsifier.dense_first_tokens < 0:
        raise UserError(f"dense_first_tokens must be 0 or greater, found {sparsifier.dense_first_tokens}")
    if (
        at_neuron
        and not sparsifier.is_selection
        and (sparsifier.phase, sparsifier.dense_first_tokens)
        != (
            "all",
            0,
        )
    ):
        raise UserError("an activation acts on every token: phase and dense_first_tokens are for masks")


@dataclass(frozen=True)
class Predictor:
    """Which neurons may be active, from a few products: those where `outer (inner x) >= threshold`.

    x is what the MLP's first projection reads. Every layer with zeros at `neuron` has the three tensors in
    the checkpoint. The predictor changes nothing unless it is asked for (the mode "predicted").
    """

    kind: str
    rank: int
    recall: float
    """The share of the active neurons that the thresholds were calibrated to let through, in each layer."""
    weighted: bool = False
    """Whether that share is of what active neurons put out, |a_i| norm(W_down[:, i]), not of their number."""
    dense_first_tokens: int = 1
    """Tokens at positions below this have all neurons: the first is an attention sink."""
    version: int = PREDICTOR_VERSION

    def __post_init__(self) -> None:
        if self.version != PREDICTOR_VERSION:
            raise UserError(f"version {self.version} of the predictor is not known; upgrade relufy")
        if self.kind not in PREDICTOR_KINDS:
            raise UserError(f"unknown predictor {self.kind!r}{suggest(self.kind, list(PREDICTOR_KINDS))}")
        if self.rank < 1:
            raise UserError(f"a predictor's rank must be at least 1, found {self.rank}")
        if not 0 < self.recall <= 1:
            raise UserError(f"recall must be above 0 and at most 1, found {self.recall:g}")
        if self.dense_first_tokens < 0:
            raise UserError(f"dense_first_tokens must be 0 or greater, found {self.dense_first_tokens}")


@dataclass(frozen=True)
class ActivationSparsity:
    """The whole block. `recipe` and `provenance` are plain data, kept for the reader and for reproduction."""

    sparsifiers: tuple[Sparsifier, ...]
    version: int = BLOCK_VERSION
    activation: str | None = None
    """The model's own activation, where the config names "relufy" instead and it is still needed."""
    recipe: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    predictor: Predictor | None = None

    def __post_init__(self) -> None:
        if self.version != BLOCK_VERSION:
            raise UserError(
                f"version {self.version} of the block is not known to this relufy; upgrade relufy"
            )

    def at(self, site: str, layer: int) -> Sparsifier | None:
        """Return the sparsifier of a site of a layer, or None where it is dense."""
        found = [s for s in self.sparsifiers if site in s.sites and s.applies_to(layer)]
        if len(found) > 1:
            raise UserError(f"two sparsifiers at the site {site!r} of layer {layer}")
        return found[0] if found else None

    def predicts(self, layer: int) -> bool:
        """Return whether the predictor, if there is one, has a part for this layer."""
        neuron = self.at("neuron", layer)
        return self.predictor is not None and neuron is not None and neuron.function in PREDICTABLE

    def to_block(self) -> dict[str, Any]:
        """Return the block as plain data; what a sparsifier leaves at its default is left out."""
        return to_mapping(self) | {"sparsifiers": [_without_defaults(s) for s in self.sparsifiers]}


def _without_defaults(sparsifier: Sparsifier) -> dict[str, Any]:
    defaults = {f.name: f.default for f in dataclasses.fields(sparsifier)}
    plain = to_mapping(sparsifier)
    return {name: plain[name] for name in plain if getattr(sparsifier, name) != defaults[name]}


def activation_name(config: Mapping[str, Any]) -> str | None:
    """Return the MLP's activation by the config's own name for it, or None if it names none.

    Where the config says "relufy", this is the activation that the block says the model had before.
    """
    name = next((config[key] for key in ACTIVATION_KEYS if config.get(key) is not None), None)
    block = config.get(BLOCK_KEY)
    if name == RELUFY_ACT and isinstance(block, Mapping):
        return block.get("activation") or name
    return name


def read_activation_sparsity(config: Mapping[str, Any]) -> ActivationSparsity:
    """Return what a config.json (as a mapping) says of sparsity: our block, or what its activation implies.

    A dense model gives an ActivationSparsity without sparsifiers. Raises UserError for a damaged block.
    """
    if config.get(BLOCK_KEY) is not None:
        return from_mapping(ActivationSparsity, config[BLOCK_KEY], f"config.json: {BLOCK_KEY}")
    name = activation_name(config)
    if name == RELUFY_ACT:
        raise UserError(
            f"config.json: activation {RELUFY_ACT!r} without the block {BLOCK_KEY!r} that defines it"
        )
    native = _native_sparsifier(name, config)
    return ActivationSparsity(sparsifiers=(native,) if native else ())


def _native_sparsifier(name: Any, config: Mapping[str, Any]) -> Sparsifier | None:
    if name == FATRELU:
        threshold = config.get(FATRELU_THRESHOLD_KEY)
        if isinstance(threshold, bool) or not isinstance(threshold, int | float):
            raise UserError(
                f"config.json: {FATRELU} needs its threshold as a number in {FATRELU_THRESHOLD_KEY!r}"
            )
        return Sparsifier(("neuron",), FATRELU, threshold=float(threshold))
    function = NATIVE_ACTIVATIONS.get(name) if isinstance(name, str) else None
    return Sparsifier(("neuron",), function) if function else None
