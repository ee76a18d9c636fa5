"""Rotary positions: the angle per position of each rotated pair, as transformers computes it."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from relufy.errors import UserError


def rope_frequencies(config: Mapping[str, Any], head_dim: int) -> tuple[float, ...]:
    """Return the angles per position, in float32. Raises UserError for what the engine can't rotate."""
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
