"""The specification of the engine's decoder: a checkpoint run in float64, with nothing skipped."""

import json
from pathlib import Path

import numpy as np

from relufy.engine.safetensors_folder import SafetensorsFolder
from relufy.engine.spec import decoder_spec

ACTIVATIONS = {
    "silu": lambda z: z / (1 + np.exp(-z)),
    "relu": lambda z: np.maximum(z, 0),
    "relu2": lambda z: np.maximum(z, 0) ** 2,
}


class NaiveDecoder:
    """Gives the logits of a text, float64 `[tokens, vocab]`."""

    def __init__(self, folder: Path):
        self.spec = decoder_spec(json.loads((folder / "config.json").read_text()))
        self._weights = SafetensorsFolder(folder)

    def logits(self, tokens: list[int]) -> np.ndarray:
        spec = self.spec
        hidden = self._weight("model.embed_tokens")[tokens]
        for index, layer in enumerate(spec.layers):
            name = f"model.layers.{index}."
            x = self._norm(hidden, name + "input_layernorm")
            if layer.attention_input_relu:
                x = np.maximum(x, 0)
            hidden = hidden + self._attention(x, name + "self_attn.")
            x = self._norm(hidden, name + "post_attention_layernorm")
            if layer.mlp_input_relu:
                x = np.maximum(x, 0)
            gate = ACTIVATIONS[layer.activation](x @ self._weight(name + "mlp.gate_proj").T - layer.shift)
            up = x @ self._weight(name + "mlp.up_proj").T
            hidden = hidden + (gate * up) @ self._weight(name + "mlp.down_proj").T
        head = "model.embed_tokens" if spec.tied_head else "lm_head"
        return self._norm(hidden, "model.norm") @ self._weight(head).T

    def _weight(self, name: str) -> np.ndarray:
        return self._weights.read(name + ".weight").astype(np.float64)

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.spec.norm_eps) * self._weight(name)

    def _attention(self, x: np.ndarray, name: str) -> np.ndarray:
        spec, positions = self.spec, np.arange(len(x))
        angles = np.outer(positions, spec.rope_frequencies)
        heads = {}
        for role, count in (("q", spec.num_heads), ("k", spec.num_kv_heads), ("v", spec.num_kv_heads)):
            projected = (x @ self._weight(f"{name}{role}_proj").T).reshape(len(x), count, spec.head_dim)
            heads[role] = projected if role == "v" else _rotate(projected, angles)
        group = spec.num_heads // spec.num_kv_heads
        out = np.empty((len(x), spec.num_heads, spec.head_dim))
        for head in range(spec.num_heads):
            scores = heads["q"][:, head] @ heads["k"][:, head // group].T / np.sqrt(spec.head_dim)
            scores[positions[:, None] < positions] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = weights / weights.sum(-1, keepdims=True) @ heads["v"][:, head // group]
        return out.reshape(len(x), -1) @ self._weight(name + "o_proj").T


def _rotate(heads: np.ndarray, angles: np.ndarray) -> np.ndarray:
    a, b = np.split(heads, 2, axis=-1)
    cosine, sine = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return np.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1)
