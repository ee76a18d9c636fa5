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

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from relufy.errors import UserError
from relufy.schema import from_mapping, suggest, to_mapping

BLOCK_KEY = "activation_sparsity"
BLOCK_VERSION = 1

SITES = ("q", "k", "v", "o", "gate", "up", "down", "neuron")
"""Inputs of the seven projections, and the activation function's output (`neuron`)."""

SPARSE_FUNCTIONS = ("relu", "relu2")
"""Functions with exact zeros. `relu2` is the squared ReLU. They apply to pre-activations at `neuron`."""

ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function", "activation")
"""The names that Hugging Face configurations give their MLP's activation."""

RELUFY_ACT = "relufy"
"""The activation name of checkpoints that stock transformers can't compute: there it fails, loudly."""


@dataclass(frozen=True)
class Sparsifier:
    """One function at some sites: `neuron <- function(pre-activation - shift)`, `q <- function(q's input)`.

    `layers` lists the blocks it applies to; None means all of them.
    """

    sites: tuple[str, ...]
    function: str
    shift: float = 0.0
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for site in self.sites:
            if site not in SITES:
                raise UserError(f"unknown site {site!r}{suggest(site, list(SITES))}")
        if self.function not in SPARSE_FUNCTIONS:
            raise UserError(
                f"unknown function {self.function!r}{suggest(self.function, list(SPARSE_FUNCTIONS))}"
            )
        if self.shift and self.sites != ("neuron",):
            raise UserError("a shift is defined for the site 'neuron' alone")

    def applies_to(self, layer: int) -> bool:
        return self.layers is None or layer in self.layers


@dataclass(frozen=True)
class ActivationSparsity:
    """The whole block. `recipe` and `provenance` are plain data, kept for the reader and for reproduction."""

    sparsifiers: tuple[Sparsifier, ...]
    version: int = BLOCK_VERSION
    recipe: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

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

    def to_block(self) -> dict[str, Any]:
        return to_mapping(self)


def activation_name(config: Mapping[str, Any]) -> str | None:
    """Return the MLP's activation by the config's own name for it, or None if it names none."""
    return next((config[key] for key in ACTIVATION_KEYS if config.get(key) is not None), None)


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
    if name in SPARSE_FUNCTIONS:
        return ActivationSparsity(sparsifiers=(Sparsifier(("neuron",), name),))
    return ActivationSparsity(sparsifiers=())
