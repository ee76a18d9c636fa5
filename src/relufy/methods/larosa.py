"""LaRoSA: layerwise rotated sparse activation (Liu et al., arXiv 2507.01299, ICML 2025).

What q k v read, and what gate and up read, is rotated into the basis of its principal components, where the
k entries of greatest magnitude are kept: `x_hat = S_k(x Q) Q^T` (section 3.2). The inputs of o and down stay
in their own basis, with a plain top-k: heads and the product with up forbid a rotation there.

This is a reference for quality. The paper folds Q into the weights and into an adapter between layers; here
it is computed for each token, which costs more than it saves, so the engine has no fast path for it. Also
left out: the paper's coefficient, searched for each model, that shifts sparsity between the inputs of
attention and of o.
"""

from collections.abc import Callable, Iterator

import torch

from relufy.activation_sparsity import Sparsifier
from relufy.method import LaRoSA
from relufy.methods.calibrate import Probe, collect
from relufy.methods.inputs import maskable_groups, num_kept
from relufy.methods.setting import Found, Setting
from relufy.model.structure import BlockSites

DAMPING = 0.01
"""What is added to the diagonal of the covariance, times its mean."""

MOMENT_BYTES = 1 << 30
"""Of second moments that are summed in one pass over the text."""

NOTE = "quality reference: no fast path"

Input = tuple[int, str]
"""A layer, and the first site that reads the input."""


def larosa(method: LaRoSA, setting: Setting) -> Found:
    """Return top-k masks for every input, and rotations for those that projections share."""
    windows = setting.text("larosa")
    widths = {
        (block.index, readers[0]): block.projections()[readers[0]].shape[1]
        for block in setting.blocks
        for _norm, readers in block.shared_inputs()
    }
    rotations, notes = {}, {}
    for inputs in _passes(widths):
        moments = {place: torch.zeros(width, width, dtype=torch.float64) for place, width in inputs.items()}
        probes = [Probe(*place, _products_to(moment)) for place, moment in moments.items()]
        notes[collect(setting, windows, probes, "calibrating").note()] = None
        rotations |= {place: rotation(moment).float() for place, moment in moments.items()}
    sparsifiers, tensors = [], {}
    for block in setting.blocks:
        for sites, first in _masks(setting, block):
            k = num_kept(block.projections()[sites[0]].shape[1], method.sparsity)
            sparsifiers.append(Sparsifier(sites, "topk", k=k, rotation=bool(first), layers=(block.index,)))
            if first:
                tensors[block.index, sites[0], "rotation"] = rotations[block.index, first]
    return Found(tuple(sparsifiers), tensors, (NOTE, *filter(None, notes)))


def rotation(moment: torch.Tensor) -> torch.Tensor:
    """Return the eigenvectors, as columns from the greatest eigenvalue on, of E[x^T x], f64."""
    damping = DAMPING * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    return torch.linalg.eigh(moment + damping).eigenvectors.flip(1)


def _masks(setting: Setting, block: BlockSites) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the sites of each mask, and the first reader of the input that is rotated there, or ""."""
    groups = maskable_groups(setting, block)
    for norm, readers in block.shared_inputs():
        if norm is not None:
            yield readers, readers[0]
        else:  # nothing makes this input for these readers alone, so each has its mask
            yield from ((group, readers[0]) for group in groups if group[0] in readers)
    yield from ((group, "") for group in groups if group[0] in ("o", "down"))


def _passes(widths: dict[Input, int]) -> Iterator[dict[Input, int]]:
    """Cut the inputs into parts whose second moments fit into memory together."""
    part: dict[Input, int] = {}
    for place, width in widths.items():
        if part and sum(8 * w * w for w in part.values()) + 8 * width * width > MOMENT_BYTES:
            yield part
            part = {}
        part[place] = width
    yield part


def _products_to(moment: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """Return what adds up x^T x of inputs `[positions, channels]`."""

    def add(x: torch.Tensor) -> None:
        wide = x.double()
        moment.add_((wide.T @ wide).cpu())

    return add
