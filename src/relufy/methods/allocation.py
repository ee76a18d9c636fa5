"""Sharing a block's sparsity out among its projections, greedily: TEAL (arXiv 2408.14690), algorithm 1.

Every step gives one projection more sparsity, worth the same number of weights whichever it is: the one whose
masks then move the block's output least. What a step moves grows with the masks that are there, so a
projection is tried again only when what it moved last time is the least of all (Minoux's lazy greedy).
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from relufy.errors import UserError
from relufy.methods.blockwise import RecordedBlock, recorded_block
from relufy.methods.inputs import Group, maskable_groups, parameters
from relufy.methods.setting import Setting
from relufy.model.structure import BlockSites
from relufy.model.trial import Mask, Trial, trial_masks

MaskAt = Callable[[int, Group, float], Mask]
"""From layer, group of sites and sparsity to the mask that makes it."""

ALLOCATION_TOKENS = 1024
"""Positions that a block's error is measured on."""


def uniform(setting: Setting, target: float) -> list[dict[Group, float]]:
    """Return the same sparsity for each group of sites of each block."""
    return [dict.fromkeys(maskable_groups(setting, block), target) for block in setting.blocks]


def greedy(
    setting: Setting, windows: np.ndarray, mask_at: MaskAt, target: float, step: float, most: float
) -> list[dict[Group, float]]:
    """Return the sparsity of each group of sites, block by block, so that each block reaches the target.

    `step` is what a projection of hidden x hidden weights gets at once, larger ones get less in proportion;
    `most` is what any may get. Raises UserError if the target is above it.
    """
    if target > most:
        raise UserError(f"a sparsity of {target} cannot be reached if no projection gets more than {most}")
    count = max(1, ALLOCATION_TOKENS // windows.shape[1])
    shares = []
    for block in setting.blocks:
        with (
            recorded_block(setting, windows[:count], block.index) as recorded,
            trial_masks(setting.blocks) as trial,
        ):
            shares.append(_allocate(setting, block, recorded, trial, mask_at, target, step, most))
        setting.progress("allocating", block.index + 1, len(setting.blocks))
    return shares


def _allocate(
    setting: Setting,
    block: BlockSites,
    recorded: RecordedBlock,
    trial: Trial,
    mask_at: MaskAt,
    target: float,
    step: float,
    most: float,
) -> dict[Group, float]:
    groups = maskable_groups(setting, block)
    weights = {group: parameters(block, group) for group in groups}
    unit = step * block.q.shape[1] ** 2
    wanted = target * sum(weights.values())
    shares, moved, error = dict.fromkeys(groups, 0.0), dict.fromkeys(groups, -math.inf), 0.0
    while (missing := wanted - _skipped(weights, shares)) > 1e-6 * wanted:
        raised = {
            g: min(most, shares[g] + min(unit, missing) / weights[g]) for g in groups if shares[g] < most
        }
        is_fresh = dict.fromkeys(raised, False)
        while not is_fresh[best := min(raised, key=lambda group: moved[group])]:
            trial.put(block.index, best[0], mask_at(block.index, best, raised[best]))
            moved[best], is_fresh[best] = recorded.error() - error, True
            _restore(trial, block.index, best, shares[best], mask_at)
        shares[best], error = raised[best], error + moved[best]
        _restore(trial, block.index, best, shares[best], mask_at)
    return shares


def _restore(trial: Trial, layer: int, group: Group, share: float, mask_at: MaskAt) -> None:
    trial.put(layer, group[0], mask_at(layer, group, share) if share else None)


def _skipped(weights: Mapping[Group, int], shares: Mapping[Group, float]) -> float:
    return sum(weights[group] * share for group, share in shares.items())


def mean_share(block: BlockSites, shares: Mapping[Sequence[str], float]) -> float:
    """Return the share of a block's linear weights that the shares of its groups leave out."""
    total = sum(parameters(block, group) for group in block.groups())
    return sum(parameters(block, group) * share for group, share in shares.items()) / total
