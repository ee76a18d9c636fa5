"""The canonical decoder as data: what a config.json says, in the words of the engine.

RMSNorm, rotary positions, grouped-query attention, a gated MLP, a tied or untied head. What a configuration
asks for beyond that is refused by name; nothing is ignored.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from relufy.activation_sparsity import ActivationSparsity, activation_name, read_activation_sparsity
from relufy.errors import UserError

FAMILIES = ("llama", "mistral")
"""The `model_type`s that the canonical decoder expresses."""

ACTIVATIONS = {"silu": 0, "swish": 0, "relu": 1, "relu2": 2}
"""The engine's number for each activation (csrc/kernels.h, Activation)."""

UNSUPPORTED = {"attention_bias": False, "mlp_bias": False, "sliding_window": None}
"""Settings that must be off, and what they are where a configuration does not say."""
UNSUPPORTED_DEFAULTS = {"mistral": {"sliding_window": 4096}}

MAX_CONTEXT = 1 << 31

ATTENTION_INPUT = ("q", "k", "v")
MLP_INPUT = ("gate", "up")


@dataclass(frozen=True)
class LayerSpec:
    """What may differ between layers: the activation and the sites with zeros."""

    activation: str
    shift: float
    has_sparse_neurons: bool
    attention_input_relu: bool
    mlp_input_relu: bool


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder that the engine can run. Widths are in elements."""

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
    rope_frequencies: tuple[float, ...]
    layers: tuple[LayerSpec, ...]

    def is_sparse(self) -> bool:
        return any(s.has_sparse_neurons or s.attention_input_relu or s.mlp_input_relu for s in self.layers)


def decoder_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a config.json. Raises UserError, naming what the engine lacks, if it can't be run."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"the engine can't run models of type {family!r} yet; it runs {', '.join(FAMILIES)}")
    for key, default in {**UNSUPPORTED, **UNSUPPORTED_DEFAULTS.get(family, {})}.items():
        if config.get(key, default):
            raise UserError(
                f"the engine can't run this {family} model yet: it has {key}={config.get(key, default)}"
            )
    try:
        num_heads, hidden_size = int(config["num_attention_heads"]), int(config["hidden_size"])
        head_dim = int(config.get("head_dim") or hidden_size // num_heads)
        num_layers = int(config["num_hidden_layers"])
        spec = DecoderSpec(
            vocab_size=int(config["vocab_size"]),
            hidden_size=hidden_size,
            intermediate_size=int(config["intermediate_size"]),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
            head_dim=head_dim,
            max_context=int(config.get("max_position_embeddings", 2048)),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            tied_head=bool(config.get("tie_word_embeddings", False)),
            rope_frequencies=_rope_frequencies(config, head_dim),
            layers=_layers(config, num_layers),
        )
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"config.json does not describe a {family} model: {error!r}") from None
    sizes = (name for name, value in vars(spec).items() if isinstance(value, int | float) and value <= 0)
    if wrong := [name for name in sizes if name != "tied_head"]:
        raise UserError(f"config.json: {wrong[0]} is {getattr(spec, wrong[0])}, which can't be right")
    if spec.max_context > MAX_CONTEXT:
        raise UserError(f"config.json: a context of {spec.max_context} positions can't be right")
    if spec.head_dim % 2 or spec.num_heads % spec.num_kv_heads:
        raise UserError(
            f"config.json: {num_heads} heads of {head_dim} over {spec.num_kv_heads} can't be right"
        )
    return spec


def _layers(config: Mapping[str, Any], num_layers: int) -> tuple[LayerSpec, ...]:
    sparsity = read_activation_sparsity(config)
    base = activation_name(config) or "silu"
    return tuple(_layer(sparsity, base, index) for index in range(num_layers))


def _layer(sparsity: ActivationSparsity, base: str, index: int) -> LayerSpec:
    for site in ("o", "down"):
        if sparsity.at(site, index):
            raise UserError(f"the engine can't skip on the input of {site} yet")
    neuron = sparsity.at("neuron", index)
    activation = neuron.function if neuron else base
    if activation not in ACTIVATIONS:
        raise UserError(f"the engine has no activation {activation!r}; it has {', '.join(ACTIVATIONS)}")
    return LayerSpec(
        activation=activation,
        shift=neuron.shift if neuron else 0.0,
        has_sparse_neurons=neuron is not None,
        attention_input_relu=_shared_relu(sparsity, ATTENTION_INPUT, index),
        mlp_input_relu=_shared_relu(sparsity, MLP_INPUT, index),
    )


def _shared_relu(sparsity: ActivationSparsity, sites: tuple[str, ...], index: int) -> bool:
    functions = {s.function if (s := sparsity.at(site, index)) else None for site in sites}
    if functions not in ({None}, {"relu"}):
        raise UserError(f"the engine needs one ReLU on the shared input of {' '.join(sites)}, or none")
    return functions == {"relu"}


def _rope_frequencies(config: Mapping[str, Any], head_dim: int) -> tuple[float, ...]:
    """Return the angle per position of each rotated pair, in float32 as transformers computes it."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if config.get("rope_scaling") not in (None, rope):
        raise UserError("config.json has both rope_parameters and rope_scaling, and they differ; keep one")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("the engine can't rotate a part of each head yet (partial_rotary_factor)")
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (np.float32(1.0) / np.float32(theta) ** exponents).astype(np.float32)
    if kind != "default" and not rope.get("factor", 1.0) > 0:
        raise UserError(f"config.json: the rotary positions {dict(rope)} make no sense")
    if kind == "linear":
        frequencies = frequencies / np.float32(rope["factor"])
    elif kind == "llama3":
        frequencies = _llama3_frequencies(frequencies, rope)
    elif kind != "default":
        raise UserError(
            f"the engine can't scale rotary positions by {kind!r} yet; it knows linear and llama3"
        )
    return tuple(float(f) for f in frequencies)


def _llama3_frequencies(frequencies: np.ndarray, rope: Mapping[str, Any]) -> np.ndarray:
    """Slow the low frequencies by `factor`, keep the high ones, and blend between (Llama 3.1)."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    turns = rope["original_max_position_embeddings"] / wavelengths
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((1 - blend) * frequencies / rope["factor"] + blend * frequencies).astype(np.float32)
