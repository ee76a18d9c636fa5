"""Texts for the tests of methods: one that the bundled model writes, and tokens drawn for tiny models."""

import functools

import numpy as np
from tests.conftest import BUNDLED
from transformers import PreTrainedModel

from relufy.method import Selecting
from relufy.methods.setting import Found
from relufy.methods.sparsify import find, make_setting
from relufy.model.checkpoint import load_model
from relufy.recipe import Recipe
from relufy.train.selftext import write_windows


def bundled_model() -> PreTrainedModel:
    return load_model(BUNDLED)


@functools.cache
def written_windows() -> tuple[np.ndarray, np.ndarray]:
    """Return two texts of the bundled model: to calibrate on, and held out."""
    windows = write_windows(bundled_model(), 48, 128, seed=5, bos=0)
    return windows[:32], windows[32:]


def drawn_windows(vocab_size: int = 53, seed: int = 0) -> np.ndarray:
    """Return random windows for a tiny model."""
    return np.random.default_rng(seed).integers(0, vocab_size, (24, 33))


def found_by(method: Selecting, model: PreTrainedModel, windows: np.ndarray) -> Found:
    """Return what a method finds; the model stays as it is."""
    setting = make_setting(model, Recipe(name="test", sparsify=method), windows)
    return find(method, setting)
