"""A model's zeros by keeping every mask: what the counting pass must find."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import families
from relufy.measure.batches import dealt_batches
from relufy.measure.counting_pass import Counted, CountingPass
from relufy.method import Relufication
from relufy.methods.sparsify import sparsify
from relufy.model.observe import observe_sites


def relufied(name: str = "llama", stage: int = 2) -> Any:
    model = families.family(name)
    if name not in families.NATIVELY_SPARSE:
        sparsify(model, Relufication(stage=stage if name in families.STAGE_2 else 1))
    return model


def windows_of(count: int, length: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(3, 53, (count, length)))


def ragged(count: int, longest: int, seed: int = 0) -> list[np.ndarray]:
    lengths = np.random.default_rng(seed).integers(2, longest + 1, count)
    return [window[:length] for window, length in zip(windows_of(count, longest), lengths, strict=True)]


def counted(model: Any, windows: Any, batch_size: int = 4, dense: Any = None) -> Counted:
    batches = dealt_batches(iter(windows), batch_size, model.config.vocab_size)
    return CountingPass(model, dense).run(batches, lambda task, done, total: None)


def kept_zeros(model: Any, windows: Sequence[np.ndarray]) -> dict[tuple[str, int], list[np.ndarray]]:
    """Return what is zero in each window run by itself, bool `[length, width]`: (site, layer) -> windows."""
    kept: defaultdict[tuple[str, int], list[np.ndarray]] = defaultdict(list)

    def keep(site: str, layer: int, is_zero: torch.Tensor) -> None:
        kept[site, layer].append(is_zero.numpy())

    with observe_sites(model, masks=keep), torch.inference_mode():
        for window in windows:
            model(torch.from_numpy(window)[None])
    return dict(kept)
