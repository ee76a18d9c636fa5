"""TEAL: training-free activation sparsity (Liu et al., arXiv 2408.14690, ICLR 2025).

The input of each projection loses its entries of little magnitude: `x_i where |x_i| >= t`, with the threshold
t of a projection such that a share p of its entries lies below it (section 4.1). Shares come from the greedy
allocation within each block, or are all the same.
"""

from dataclasses import replace

from relufy.method import Teal
from relufy.methods.allocation import allocation_of
from relufy.methods.calibrate import collect
from relufy.methods.inputs import Group, InputSketches, masks_by_threshold
from relufy.methods.setting import Found, Setting
from relufy.model.trial import Mask, keep_at_least


def teal(method: Teal, setting: Setting) -> Found:
    """Return the thresholds of every projection's input."""
    calibrated = setting.remembered(replace(method, sparsity=0.5), lambda: _Calibrated(method, setting))
    shares = calibrated.allocation.shares(method.sparsity)
    sparsifiers = []
    for block, of_block in zip(setting.blocks, shares, strict=True):
        thresholds = {g: calibrated.inputs.threshold(block.index, g, s) for g, s in of_block.items()}
        sparsifiers += masks_by_threshold(block, thresholds)
    return Found(tuple(sparsifiers), notes=(calibrated.note,))


class _Calibrated:
    """What serves every target: the inputs' distributions, and the allocation as far as it was needed."""

    def __init__(self, method: Teal, setting: Setting) -> None:
        windows = setting.text("teal")
        self.inputs = InputSketches(setting)
        self.note = collect(setting, windows, self.inputs.probes(), "calibrating").note()
        self.allocation = allocation_of(method, setting, windows, self._mask_at)

    def _mask_at(self, layer: int, group: Group, share: float) -> Mask:
        return keep_at_least(self.inputs.threshold(layer, group, share))
