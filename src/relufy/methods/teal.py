"""TEAL: training-free activation sparsity (Liu et al., arXiv 2408.14690, ICLR 2025).

The input of each projection loses its entries of little magnitude: `x_i where |x_i| >= t`, with the threshold
t of a projection such that a share p of its entries lies below it (section 4.1). Shares come from the greedy
allocation within each block, or are all the same.
"""

from relufy.method import Teal
from relufy.methods.allocation import greedy, uniform
from relufy.methods.calibrate import collect
from relufy.methods.inputs import Group, InputSketches, masks_by_threshold
from relufy.methods.setting import Found, Setting
from relufy.model.trial import Mask, keep_at_least


def teal(method: Teal, setting: Setting) -> Found:
    """Return the thresholds of every projection's input."""
    windows = setting.text("teal")
    inputs = InputSketches(setting)
    collected = collect(setting, windows, inputs.probes(), "calibrating")

    def mask_at(layer: int, group: Group, share: float) -> Mask:
        return keep_at_least(inputs.threshold(layer, group, share))

    if method.allocation == "uniform":
        shares = uniform(setting, method.sparsity)
    else:
        shares = greedy(setting, windows, mask_at, method.sparsity, method.step, method.most)
    sparsifiers = []
    for block, of_block in zip(setting.blocks, shares, strict=True):
        thresholds = {g: inputs.threshold(block.index, g, share) for g, share in of_block.items()}
        sparsifiers += masks_by_threshold(block, thresholds)
    return Found(tuple(sparsifiers), notes=(collected.note(),))
