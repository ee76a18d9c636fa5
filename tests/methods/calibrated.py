"""What the tests of calibrated methods share: text, models small enough to calibrate in no time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

import families
from relufy.methods.sparsify import sparsify
from relufy.model.checkpoint import load_model, save_checkpoint
from relufy.model.observe import observe_sites
from relufy.model.sites import find_sites

IDS = torch.tensor([[3, 4, 5, 50, 7, 8, 20, 33], [0, 1, 2, 9, 9, 40, 41, 6]])
VOCAB = 53


def text(count: int = 24, length: int = 48, seed: int = 0, vocab: int = VOCAB) -> np.ndarray:
    """Return windows of random tokens."""
    return np.random.default_rng(seed).integers(0, vocab, (count, length))


def calibrated(name: str, method: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a tiny model of a family, made sparse by a method."""
    return sparsify(families.family(name, dtype), method, text())


def realised(model: PreTrainedModel, windows: np.ndarray, sites: Sequence[str] | None = None) -> float:
    """Return the share of the blocks' linear weights that is not read, at these sites or at all."""
    with observe_sites(model) as observer, torch.inference_mode():
        model(torch.from_numpy(windows))
    skipped, total = 0.0, 0
    for block in find_sites(model):
        for group in block.groups():
            if sites is None or set(group) & set(sites):
                outputs, inputs = block.projections()[group[0]].shape
                skipped += outputs * inputs * observer.sparsity()[group[0]][block.index]
                total += outputs * inputs
    return skipped / total


def saved_and_loaded(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    save_checkpoint(model, None, folder)
    return load_model(folder, dtype)
