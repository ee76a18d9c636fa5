"""TEAL: training-free activation sparsity (Liu et al., arXiv 2408.14690, ICLR 2025).

The input of each projection loses its entries of little magnitude: `x_i where |x_i| >= t`, with the threshold
t of a projection such that a share p of its entries lies below it (section 4.1). Shares come from the greedy
allocation within each block, or are all the same.
"""

from relufy.method import Teal
from relufy.methods.allocation import Group, greedy, uniform
from relufy.methods.calibrate import Probe, collect
from relufy.methods.inputs import masks_by_threshold, same_tensor
from relufy.methods.setting import Found, Setting
from relufy.methods.sketch import Sketch
from relufy.model.trial import Mask, keep_at_least


def teal(method: Teal, setting: Setting) -> Found:
    """Return the thresholds of every projection's input."""
    windows = setting.text("teal")
    sketches = {
        (block.index, first): Sketch()
        for block in setting.blocks
        for first in set(same_tensor(block).values())
    }
    probes = [Probe(layer, site, sketch.add) for (layer, site), sketch in sketches.items()]
    collected = collect(setting, windows, probes, "calibrating")

    def threshold(layer: int, group: Group, share: float) -> float:
        return sketches[layer, same_tensor(setting.blocks[layer])[group[0]]].quantile(share)

    def mask_at(layer: int, group: Group, share: float) -> Mask:
        return keep_at_least(threshold(layer, group, share))

    if method.allocation == "uniform":
        shares = uniform(setting, method.sparsity)
    else:
        shares = greedy(setting, windows, mask_at, method.sparsity, method.step, method.most)
    sparsifiers = []
    for block, of_block in zip(setting.blocks, shares, strict=True):
        thresholds = {group: threshold(block.index, group, share) for group, share in of_block.items()}
        sparsifiers += masks_by_threshold(block, thresholds)
    return Found(tuple(sparsifiers), notes=tuple(filter(None, (collected.note(),))))
