"""Sharing a block's sparsity out among its projections, greedily: TEAL (arXiv 2408.14690), algorithm 1.

Every step gives one projection more sparsity, worth the same number of weights whichever it is: the one whose
masks then move the block's output least. What a step moves grows with the masks that are there, so a
projection is tried again only when what it moved last time is the least of all (Minoux's lazy greedy).
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

from relufy.errors import UserError
from relufy.method import Teal, Wina
from relufy.methods.blockwise import RecordedBlock, recorded_block
from relufy.methods.inputs import Group, maskable_groups, parameters
from relufy.methods.setting import Setting
from relufy.model.structure import BlockSites
from relufy.model.trial import Mask, Trial, trial_masks

MaskAt = Callable[[int, Group, float], Mask]
"""From layer, group of sites and sparsity to the mask that makes it."""

ALLOCATION_TOKENS = 1024
"""Positions that a block's error is measured on."""


class Uniform:
    """The same share for each group of sites of each block."""

    def __init__(self, setting: Setting) -> None:
        self._groups = [maskable_groups(setting, block) for block in setting.blocks]

    def shares(self, target: float) -> list[dict[Group, float]]:
        """Return the sparsity of each group of sites, block by block."""
        return [dict.fromkeys(groups, target) for groups in self._groups]


class Greedy:
    """The greedy shares for any target: a block's path does not depend on where it ends, so what was found
    for one target serves the others.

    `step` is what a projection of hidden x hidden weights gets at once, larger ones get less in proportion;
    `most` is what any may get.
    """

    def __init__(
        self, setting: Setting, windows: np.ndarray, mask_at: MaskAt, step: float, most: float
    ) -> None:
        self._setting = setting
        self._windows = windows[: max(1, ALLOCATION_TOKENS // windows.shape[1])]
        self._most = most
        self._paths = [_Path(setting, block, mask_at, step, most) for block in setting.blocks]

    def shares(self, target: float) -> list[dict[Group, float]]:
        """Return the sparsity of each group of sites, block by block, so that each block reaches the target.

        Raises UserError if the target is above the most that any may get.
        """
        if target > self._most:
            raise UserError(
                f"a sparsity of {target} cannot be reached if no projection gets more than {self._most}"
            )
        for done, path in enumerate(self._paths, start=1):
            if not path.reaches(target):
                self._extend(path, target)
            self._setting.progress("allocating", done, len(self._paths))
        return [path.shares(target) for path in self._paths]

    def _extend(self, path: "_Path", target: float) -> None:
        with (
            recorded_block(self._setting, self._windows, path.block.index) as recorded,
            trial_masks(self._setting.blocks) as trial,
        ):
            path.extend(target, recorded, trial)


class _Path:
    """The steps of one block, each a group of sites and its share from then on."""

    def __init__(
        self, setting: Setting, block: BlockSites, mask_at: MaskAt, step: float, most: float
    ) -> None:
        self.block = block
        self._mask_at, self._most = mask_at, most
        self._weights = {group: parameters(block, group) for group in maskable_groups(setting, block)}
        self._unit = step * block.q.shape[1] ** 2
        self._steps: list[tuple[Group, float]] = []
        self._last = dict.fromkeys(self._weights, 0.0)
        self._moved, self._error = dict.fromkeys(self._weights, -math.inf), 0.0

    def reaches(self, target: float) -> bool:
        return self._skipped(self._last) >= self._wanted(target)

    def shares(self, target: float) -> dict[Group, float]:
        """Return the shares at a target that the path reaches; of the last step, as much as is missing."""
        shares = dict.fromkeys(self._weights, 0.0)
        for group, share in self._steps:
            missing = self._wanted(target) - self._skipped(shares)
            shares[group] = min(share, shares[group] + missing / self._weights[group])
            if shares[group] < share:
                break
        return shares

    def extend(self, target: float, recorded: RecordedBlock, trial: Trial) -> None:
        """Take steps until the block reaches the target."""
        for group in self._last:
            self._put(trial, group, self._last[group])
        while not self.reaches(target):
            raised = {
                group: min(self._most, share + self._unit / self._weights[group])
                for group, share in self._last.items()
                if share < self._most
            }
            is_fresh = dict.fromkeys(raised, False)
            while not is_fresh[best := min(raised, key=lambda group: self._moved[group])]:
                self._put(trial, best, raised[best])
                self._moved[best], is_fresh[best] = recorded.error() - self._error, True
                self._put(trial, best, self._last[best])
            self._last[best], self._error = raised[best], self._error + self._moved[best]
            self._steps.append((best, raised[best]))
            self._put(trial, best, raised[best])

    def _put(self, trial: Trial, group: Group, share: float) -> None:
        layer = self.block.index
        trial.put(layer, group[0], self._mask_at(layer, group, share) if share else None)

    def _wanted(self, target: float) -> float:
        return target * sum(self._weights.values()) * (1 - 1e-9)

    def _skipped(self, shares: Mapping[Group, float]) -> float:
        return sum(self._weights[group] * share for group, share in shares.items())


def allocation_of(
    method: Teal | Wina, setting: Setting, windows: np.ndarray, mask_at: MaskAt
) -> Uniform | Greedy:
    """Return the allocation that a method asks for."""
    if method.allocation == "uniform":
        return Uniform(setting)
    return Greedy(setting, windows, mask_at, method.step, method.most)
