"""Thresholds for wanted densities: random tokens run through the layers, each site cut at a quantile.

A site's mask is applied before the next site is looked at, as it will be when the model runs. Thresholds
depend on the context: attention over more positions averages more, so o's input is smaller.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from relufy.activation_sparsity import Sparsifier
from relufy.engine.safetensors_folder import SafetensorsFolder
from relufy.engine.spec import DecoderSpec, decoder_spec
from relufy.errors import UserError

NUM_MEASURED = 64
"""The positions around the context's end whose quantiles are taken."""


@dataclass(frozen=True)
class Densities:
    """The shares that stay: of the MLP's neurons, and of the inputs of q k v, o and gate (None: all).

    With `union`, only that share of each layer's neurons is ever active, drawn at random: what a real model's
    tokens need together, however many of them. With `candidates`, that share of the neurons is named by a
    random predictor of a rank, and those that are active are among them, as if it missed none.
    """

    neurons: float
    inputs: float | None = None
    union: float | None = None
    candidates: float | None = None
    rank: int = 0

    def __post_init__(self) -> None:
        named = {"--mlp-density": self.neurons, "--input-density": self.inputs, "--window-union": self.union}
        named["--candidate-density"] = self.candidates
        for name, value in named.items():
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{name} must be above 0 and at most 1, found {value:g}")
        if self.candidates is not None and self.candidates < self.neurons:
            raise UserError(
                f"--candidate-density {self.candidates:g} is below --mlp-density {self.neurons:g}: active "
                "neurons are among the candidates"
            )
        if self.union is not None and self.union <= 2 * self.neurons:
            raise UserError(
                f"--window-union must be more than twice --mlp-density {self.neurons:g}, for half of all "
                f"gates are positive; found {self.union:g}"
            )

    def label(self) -> str:
        inputs = "" if self.inputs is None else f"-input{self.inputs:g}"
        union = "" if self.union is None else f"-union{self.union:g}"
        candidates = "" if self.candidates is None else f"-candidates{self.candidates:g}-rank{self.rank}"
        return f"mlp{self.neurons:g}{inputs}{union}{candidates}"


@dataclass(frozen=True)
class Found:
    """Sparsifiers, layer by layer, and the threshold of each layer's predictor, if there is one."""

    sparsifiers: list[Sparsifier]
    predictor_thresholds: list[float]


def find_sparsifiers(
    weights: SafetensorsFolder,
    config: Mapping[str, Any],
    densities: Densities,
    context: int,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> Found:
    """Return sparsifiers, layer by layer, that give a dense Llama the densities at a context."""
    spec = decoder_spec(config)
    num_tokens = max(context, NUM_MEASURED // 2) + NUM_MEASURED // 2
    tokens = np.random.default_rng([seed, 0]).integers(0, spec.vocab_size, num_tokens)
    hidden = weights.read("model.embed_tokens.weight")[tokens]
    found = Found([], [])
    for index in range(spec.num_layers):
        layer = _Layer(weights, spec, index, densities)
        hidden = layer.forward(hidden)
        found.sparsifiers.extend(layer.sparsifiers)
        found.predictor_thresholds.extend(layer.predictor_thresholds)
        progress("setting thresholds", index + 1, spec.num_layers)
    return found


class _Layer:
    """One block, which chooses its thresholds while it is computed."""

    def __init__(self, weights: SafetensorsFolder, spec: DecoderSpec, index: int, densities: Densities):
        self._weights, self._spec, self._index, self._densities = weights, spec, index, densities
        self.sparsifiers: list[Sparsifier] = []
        self.predictor_thresholds: list[float] = []

    def forward(self, hidden: np.ndarray) -> np.ndarray:
        x = self._masked(self._norm(hidden, "input_layernorm"), ("q", "k", "v"))
        attended = self._masked(self._attention(x), ("o",))
        hidden = hidden + self._linear(attended, "self_attn.o_proj")
        x = self._norm(hidden, "post_attention_layernorm")
        masked = self._masked(x, ("gate",))
        gates = self._neurons(self._linear(masked, "mlp.gate_proj"), self._candidates(masked))
        return hidden + self._linear(gates * self._linear(x, "mlp.up_proj"), "mlp.down_proj")

    def _masked(self, x: np.ndarray, sites: tuple[str, ...]) -> np.ndarray:
        density = self._densities.inputs
        if density is None:
            return x
        threshold = _cut(np.abs(x), density)
        self.sparsifiers.append(Sparsifier(sites, "threshold", threshold=threshold, layers=(self._index,)))
        return np.where(np.abs(x) >= np.float32(threshold), x, np.float32(0))

    def _candidates(self, x: np.ndarray) -> np.ndarray | None:
        """Return which neurons the predictor names, bools `[tokens, neurons]`; None without one."""
        density = self._densities.candidates
        if density is None:
            return None
        inner, outer = (self._read_of_predictor(name) for name in ("inner", "outer"))
        scores = x @ inner.T @ outer.T
        threshold = _cut(scores, density)
        self.predictor_thresholds.append(threshold)
        return scores >= np.float32(threshold)

    def _neurons(self, gates: np.ndarray, candidates: np.ndarray | None) -> np.ndarray:
        """Return the activations; where there are candidates, so many of them are active that the share of
        all neurons is as wanted."""
        share = self._densities.neurons / (self._densities.candidates or 1.0)
        shift = _cut(gates, share)
        self.sparsifiers.append(Sparsifier(("neuron",), "relu", shift=shift, layers=(self._index,)))
        activated = np.maximum(gates - np.float32(shift), 0)
        return activated if candidates is None else np.where(candidates, activated, np.float32(0))

    def _attention(self, x: np.ndarray) -> np.ndarray:
        spec, count = self._spec, len(x)
        angles = np.outer(np.arange(count), np.array(spec.rope_frequencies)).astype(np.float32)
        q, k, v = (
            self._linear(x, f"self_attn.{role}_proj").reshape(count, -1, spec.head_dim) for role in "qkv"
        )
        q, k = _rotate(q, angles), _rotate(k, angles)
        future = np.triu(np.full((count, count), -np.inf, np.float32), 1)
        out = np.empty_like(q)
        for head in range(spec.num_heads):
            kv_head = head * spec.num_kv_heads // spec.num_heads
            scores = q[:, head] @ k[:, kv_head].T * np.float32(spec.head_dim**-0.5) + future
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, kv_head]
        return out.reshape(count, -1)

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self._read(name).T

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + np.float32(self._spec.norm_eps))
        return x / scale * self._read(name)

    def _read_of_predictor(self, name: str) -> np.ndarray:
        return self._weights.read(f"model.layers.{self._index}.mlp.gate_proj.predictor.{name}")

    def _read(self, name: str) -> np.ndarray:
        return self._weights.read(f"model.layers.{self._index}.{name}.weight")


def _cut(scores: np.ndarray, density: float) -> float:
    """Return the value that a share of the measured positions' scores reaches."""
    return float(np.float32(np.quantile(scores[-NUM_MEASURED:], 1 - density)))


def _rotate(heads: np.ndarray, angles: np.ndarray) -> np.ndarray:
    a, b = np.split(heads, 2, axis=-1)
    cosine, sine = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return np.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1)
