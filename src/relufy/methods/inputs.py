"""The inputs that a method can mask: which sites one mask may serve, and what each is worth."""

from collections.abc import Iterator, Sequence

import torch

from relufy.activation_sparsity import Sparsifier
from relufy.measure.sketch import Sketch
from relufy.methods.calibrate import Probe
from relufy.methods.setting import Setting
from relufy.model.configuration import sparsity_of
from relufy.model.structure import BlockSites, Projection

Group = tuple[str, ...]
"""The sites that one projection serves."""


def maskable_groups(setting: Setting, block: BlockSites) -> list[Group]:
    """Return the sites of a block by the projection that serves them, without a `down` that reads zeros
    already: in a plain MLP with an activation that makes them, `neuron` and `down` are one site."""
    has_zeros = sparsity_of(setting.model).at("neuron", block.index) is not None
    left_out = {("down",)} if has_zeros and block.gate is None else set()
    return [group for group in block.groups() if group not in left_out]


def parameters(block: BlockSites, group: Sequence[str]) -> int:
    """Return the number of weights of the projection that serves a group of sites."""
    outputs, inputs = block.projections()[group[0]].shape
    return outputs * inputs


def same_tensor(block: BlockSites) -> dict[str, str]:
    """Return each site's first site that reads the very same tensor: q for q k v, gate for gate up."""
    firsts = {site: site for site in block.projections()}
    for _norm, readers in block.shared_inputs():
        firsts |= dict.fromkeys(readers, readers[0])
    return firsts


class InputSketches:
    """How the magnitudes at every projection's input are distributed; inputs that are shared, once."""

    def __init__(self, setting: Setting) -> None:
        self._firsts = [same_tensor(block) for block in setting.blocks]
        self._sketches = {
            (layer, first): Sketch() for layer, firsts in enumerate(self._firsts) for first in firsts.values()
        }

    def probes(self) -> list[Probe]:
        return [Probe(layer, site, sketch.add) for (layer, site), sketch in self._sketches.items()]

    def merge(self, other: "InputSketches") -> None:
        for key, sketch in other._sketches.items():
            self._sketches[key].merge(sketch)

    def threshold(self, layer: int, group: Group, share: float) -> float:
        """Return the threshold that leaves out this share of the entries."""
        return self._sketches[layer, self._firsts[layer][group[0]]].quantile(share)


def masks_by_threshold(block: BlockSites, thresholds: dict[Group, float]) -> Iterator[Sparsifier]:
    """Yield sparsifiers of a block from the threshold of each group; a threshold of 0 is no mask.

    Groups that read one norm's output with one threshold get one mask, where adapters see it too.
    """
    by_site = {site: threshold for group, threshold in thresholds.items() for site in group}
    left = dict(thresholds)
    for norm, readers in block.shared_inputs():
        values = {by_site.get(site, 0.0) for site in readers}
        if norm is not None and len(values) == 1:
            left = {group: value for group, value in left.items() if group[0] not in readers}
            left[readers] = values.pop()
    for sites, threshold in left.items():
        if threshold > 0:
            yield Sparsifier(sites, "threshold", threshold=threshold, layers=(block.index,))


def column_norms(projection: Projection) -> torch.Tensor:
    """Return `norm(W[:, i])` of each input i, f32 `[in]`: of a fused projection, of its whole column."""
    return projection.matrix().double().norm(dim=0).float()


def num_kept(width: int, sparsity: float) -> int:
    """Return the k of a top-k that leaves out a share of the entries; it keeps one at least."""
    return max(1, round((1 - sparsity) * width))
