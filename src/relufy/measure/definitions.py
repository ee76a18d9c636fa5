"""The four meanings of "x % sparsity" in the field, each from what was observed on a text.

They are not comparable with each other (a gate-only 50 % is a model-level 22 % on Llama-2-7B), so every
figure goes by the name of its definition. Three count exact zeros, behind all masks; cett.py has the fourth.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from relufy.measure.modes import Scored, WindowLosses, window_losses
from relufy.measure.zero_counts import CollectedZeros, ZeroCounts, mean_of
from relufy.model.observe import observe_sites

DEFINITIONS = {
    "intrinsic_zero_fraction": "share of exact zeros in the input of down, a mean over tokens and layers "
    "(ReLU Strikes Back, ProSparse)",
    "cett_sparsity": "share of neurons that can be left out, the least ones first by |a_i| times the norm of "
    "down's column, until each layer's mean relative error is 0.2 (ReLU2 Wins, Sparsing Law); an oracle",
    "gate_only_sparsity": "share of exact zeros in the activation's output, a mean over tokens and layers "
    "(CATS, CHESS)",
    "model_level_sparsity": "share of the blocks' linear weights that are not read, a mean over tokens; rows "
    "of up by zero neurons where those are made, all else by zero inputs; low-rank branches count as read "
    "(TEAL, R-Sparse, WINA, LaRoSA)",
}


@dataclass(frozen=True)
class ZeroSparsities:
    """Three of the definitions, over `tokens` positions, and what they were made from."""

    intrinsic_zero_fraction: float
    gate_only_sparsity: float
    model_level_sparsity: float
    model_level_p5: float
    """The 5th percentile over tokens."""
    model_level_p95: float
    tokens: int
    sites: dict[str, tuple[float, ...]]
    """Site -> the share of zeros, one value per layer."""


def measure_zeros(
    model: PreTrainedModel, windows: np.ndarray, scored: Scored, batch_size: int = 16
) -> tuple[ZeroSparsities, WindowLosses]:
    """Run windows, int64 `[windows, length]`, once, and return their sparsities and their losses."""
    counts = ZeroCounts(model)

    def add(site: str, layer: int, zeros: torch.Tensor) -> None:
        counted = scored.split(zeros, 0)[1].flatten()
        if len(counted):
            counts.add(site, layer, counted)

    with observe_sites(model, add):
        losses = window_losses(model, windows, scored, batch_size)
    return zero_sparsities(counts.collect()), losses


def zero_sparsities(found: CollectedZeros) -> ZeroSparsities:
    """Return the definitions of what was counted."""
    sites = {site: found.means(site) for site in found.counts.sites}
    unread = found.unread()
    return ZeroSparsities(
        intrinsic_zero_fraction=mean_of(sites["down"]),
        gate_only_sparsity=mean_of(sites["neuron"]),
        model_level_sparsity=unread.mean,
        model_level_p5=unread.p5,
        model_level_p95=unread.p95,
        tokens=found.tokens,
        sites=sites,
    )
