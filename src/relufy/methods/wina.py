"""WINA: weight-informed neuron activation (Chen et al., arXiv 2505.19427, ICLR 2026).

Entries of a projection's input are kept by what they add to its output: by `|x_i| * norm(W[:, i])`, the
threshold or the k greatest of each token (section 3, equation 3). Every projection has its own norms, so that
readers of one input have masks of their own; a fused projection has the norms of its whole columns.

The paper's bound on the error needs W with orthogonal columns. It gets them by rotating the residual stream
with the singular vectors of k and gate, after folding the norms' gains into the weights. That is not done
here: it rewrites every weight of the checkpoint, and puts another matrix on each residual connection. The
score is as good a choice without it, only not provably the best.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from relufy.activation_sparsity import Sparsifier
from relufy.measure.sketch import Sketch
from relufy.method import Wina
from relufy.methods.allocation import allocation_of
from relufy.methods.calibrate import Probe, collect
from relufy.methods.inputs import Group, column_norms, maskable_groups, num_kept
from relufy.methods.setting import Found, Setting
from relufy.model.selections import Selection, TokenPositions
from relufy.model.trial import Mask


def wina(method: Wina, setting: Setting) -> Found:
    """Return the masks of every projection's input, with the norms of its columns."""
    calibrated = setting.remembered(replace(method, sparsity=0.5), lambda: _Calibrated(method, setting))
    shares = calibrated.allocation.shares(method.sparsity)
    chosen = [(layer, *pair) for layer, of_block in enumerate(shares) for pair in of_block.items()]
    found = [calibrated.selection(*place) for place in chosen if place[2] > 0]
    sparsifiers = tuple(s for s in found if s.threshold != 0)  # there, enough zeros come by themselves
    placed = [(layer, s.sites[0]) for s in sparsifiers for layer in s.layers or ()]
    tensors = {(*place, "weight"): calibrated.norms[place] for place in placed}
    return Found(sparsifiers, tensors, (calibrated.note,))


class _Calibrated:
    """What serves every target: norms, the scores' distributions, and the allocation as far as needed."""

    def __init__(self, method: Wina, setting: Setting) -> None:
        windows = setting.text("wina")
        self._is_topk = method.select == "topk"
        self.norms = {
            (block.index, group[0]): column_norms(block.projections()[group[0]])
            for block in setting.blocks
            for group in maskable_groups(setting, block)
        }
        self._scores = {place: Sketch() for place in self.norms}
        probes = [Probe(*place, _scores_to(self._scores[place], self.norms[place])) for place in self.norms]
        self.note = collect(setting, windows, probes, "calibrating").note()
        self.allocation = allocation_of(method, setting, windows, self._mask_at)

    def selection(self, layer: int, group: Group, share: float) -> Sparsifier:
        """Return the sparsifier of a group of sites that leaves out a share of its inputs."""
        shared = {"per_channel": ("weight",), "layers": (layer,)}
        if self._is_topk:
            return Sparsifier(group, "topk", k=num_kept(len(self.norms[layer, group[0]]), share), **shared)
        threshold = self._scores[layer, group[0]].quantile(share)
        return Sparsifier(group, "threshold", threshold=threshold, **shared)

    def _mask_at(self, layer: int, group: Group, share: float) -> Mask:
        tensors = {"weight": self.norms[layer, group[0]]}
        return Selection(self.selection(layer, group, share), tensors, TokenPositions())


def _scores_to(sketch: Sketch, norms: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """Return what counts the scores of inputs `[positions, channels]`, in the arithmetic of Selection."""
    return lambda x: sketch.add(norms * x.float().abs())
