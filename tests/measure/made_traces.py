"""Traces made by hand, and windows for tiny models."""

from collections.abc import Sequence

import numpy as np
import torch

from relufy.measure.traces import Trace


def trace(
    active: Sequence | np.ndarray, layer: int = 0, first: int = 0, lengths: Sequence[int] | None = None
) -> Trace:
    """Return a trace of `[windows, time, width]` ones and zeros."""
    values = torch.as_tensor(np.asarray(active)).bool()
    return Trace(layer, first, values, tuple(lengths or [values.shape[1]] * values.shape[0]))


def bernoulli(rates: np.ndarray, windows: int, time: int, seed: int = 0) -> np.ndarray:
    """Return activity of neurons that fire independently at these rates, bool `[windows, time, width]`."""
    return np.random.default_rng(seed).random((windows, time, len(rates))) < rates


def windows_of(count: int = 12, length: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 53, (count, length))
