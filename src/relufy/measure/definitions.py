"""The four meanings of "x % sparsity" in the field, each from what was observed on a text.

They are not comparable with each other (a gate-only 50 % is a model-level 22 % on Llama-2-7B), so every
figure goes by the name of its definition. Three count exact zeros, behind all masks; cett.py has the fourth.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from relufy.measure.modes import Scored, WindowLosses, window_losses
from relufy.model.configuration import sparsity_of
from relufy.model.observe import observe_sites
from relufy.model.structure import BlockSites, find_blocks

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


def site_weights(block: BlockSites) -> dict[str, int]:
    """Return the number of weights that belong to each site of a block; fused projections are taken apart."""
    weights = {site: p.shape[0] * p.shape[1] for site, p in block.projections().items()}
    if block.q == block.v:
        queries = block.o.shape[1] * block.q.shape[1]
        keys = (weights["q"] - queries) // 2
        weights |= {"q": queries, "k": keys, "v": keys}
    if block.gate == block.up:
        weights |= {"gate": weights["up"] // 2, "up": weights["up"] // 2}
    return weights


def measure_zeros(
    model: PreTrainedModel, windows: np.ndarray, scored: Scored, batch_size: int = 16
) -> tuple[ZeroSparsities, WindowLosses]:
    """Run windows, int64 `[windows, length]`, once, and return their sparsities and their losses."""
    counts = _Counts(model, scored)
    with observe_sites(model, counts.add):
        losses = window_losses(model, windows, scored, batch_size)
    return counts.sparsities(), losses


class _Counts:
    """Zeros by site and layer, and by token the weights that they make unnecessary."""

    def __init__(self, model: PreTrainedModel, scored: Scored) -> None:
        self._blocks, self._scored = find_blocks(model), scored
        self._widths = [_widths(block) for block in self._blocks]
        self._weights = [_weights_by_list(model, block) for block in self._blocks]
        self._total = sum(sum(site_weights(block).values()) for block in self._blocks)
        self._branches = sum(_branch_weights(block) for block in self._blocks)
        self._zeros: defaultdict[tuple[str, int], float] = defaultdict(float)
        self._unread: list[torch.Tensor] = []
        self._tokens = 0

    def add(self, site: str, layer: int, zeros: torch.Tensor) -> None:
        """Count a site's zeros at each token of the running pass, `[batch * time]`."""
        counted = self._scored.split(zeros, 0)[1].flatten().double()
        if not len(counted):
            return
        if site == "q" and layer == 0:
            self._unread.append(torch.zeros_like(counted))
            self._tokens += len(counted)
        shares = counted / self._widths[layer][site]
        self._zeros[site, layer] += float(shares.sum())
        self._unread[-1] += shares * self._weights[layer].get(site, 0)

    def sparsities(self) -> ZeroSparsities:
        sites = {
            site: tuple(self._zeros[site, layer] / self._tokens for layer in range(len(self._blocks)))
            for site in self._widths[0]
        }
        unread = (torch.cat(self._unread) - self._branches) / self._total
        least, most = torch.quantile(unread, torch.tensor([0.05, 0.95], dtype=unread.dtype)).tolist()
        return ZeroSparsities(
            intrinsic_zero_fraction=_mean(sites["down"]),
            gate_only_sparsity=_mean(sites["neuron"]),
            model_level_sparsity=float(unread.mean()),
            model_level_p5=least,
            model_level_p95=most,
            tokens=self._tokens,
            sites=sites,
        )


def _widths(block: BlockSites) -> dict[str, int]:
    return {site: p.shape[1] for site, p in block.projections().items()} | {"neuron": block.down.shape[1]}


def _weights_by_list(model: PreTrainedModel, block: BlockSites) -> dict[str, int]:
    """Return the weights that are left unread by the zeros of each site: those of up by `neuron`, where a
    gate's activation makes zeros, since the engine then skips rows, and not their columns."""
    weights = site_weights(block)
    if block.gate is not None and sparsity_of(model).at("neuron", block.index) is not None:
        weights["neuron"] = weights.pop("up")
    return weights


def _branch_weights(block: BlockSites) -> int:
    """Return how many weights the low-rank branches of a block have."""
    modules = {p.name: p.module for p in block.projections().values()}.values()
    masks: Sequence[Any] = [getattr(module, "sparsifier", None) for module in modules]
    factors = [
        getattr(mask, name, None) for mask in masks if mask for name in ("low_rank_in", "low_rank_out")
    ]
    return sum(factor.numel() for factor in factors if factor is not None)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
