"""Which weights belong to each site of a block, and by which list of zeros the engine leaves them out."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from relufy.model.configuration import sparsity_of
from relufy.model.structure import BlockSites


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


def weights_by_list(model: PreTrainedModel, block: BlockSites) -> dict[str, int]:
    """Return the weights that are left unread by the zeros of each site: those of up by `neuron`, where a
    gate's activation makes zeros, since the engine then skips rows, and not their columns."""
    weights = site_weights(block)
    if block.gate is not None and sparsity_of(model).at("neuron", block.index) is not None:
        weights["neuron"] = weights.pop("up")
    return weights


def branch_weights(block: BlockSites) -> int:
    """Return how many weights the low-rank branches of a block have."""
    modules = {p.name: p.module for p in block.projections().values()}.values()
    masks: Sequence[Any] = [getattr(module, "sparsifier", None) for module in modules]
    factors = [
        getattr(mask, name, None) for mask in masks if mask for name in ("low_rank_in", "low_rank_out")
    ]
    return sum(factor.numel() for factor in factors if factor is not None)
