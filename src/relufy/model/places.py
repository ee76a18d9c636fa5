"""Where a block's sparsifiers go: on which module each one sits, and which tensors it has there.

An input that all its readers select from alike gets one mask where it is made, on the norm's output, so that
adapters see the same input as the weights that they will be merged into. Every other mask is a projection's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.model.structure import BlockSites, Projection

Shape = tuple[int | None, ...]
"""A tensor's shape; None where any size will do."""


@dataclass(frozen=True)
class Place:
    """One module of a block, and the sparsifier that it gets."""

    kind: Literal["activation", "norm", "projection"]
    name: str
    """The module's dotted name in the model."""
    module: nn.Module
    sparsifier: Sparsifier
    width: int
    """Channels of what the sparsifier acts on."""
    outputs: int
    """Rows of the projection's weight; 0 for the others."""
    block: BlockSites

    def tensors(self) -> dict[str, Shape]:
        """Return the shape of each tensor that the sparsifier has here."""
        shapes: dict[str, Shape] = {name: (self.width,) for name in self.sparsifier.per_channel}
        if self.sparsifier.correction:
            shapes |= {"low_rank_in": (None, self.width), "low_rank_out": (self.outputs, None)}
        if self.sparsifier.rotation:
            shapes["rotation"] = (self.width, self.width)
        return shapes

    def sites(self) -> tuple[str, ...]:
        """Return the sites where it is: those reading the norm, or those that the projection serves."""
        if self.kind == "activation":
            return ("neuron",)
        if self.kind == "projection":
            return tuple(site for site, p in self.block.projections().items() if p.name == self.name)
        return next(r for norm, r in self.block.shared_inputs() if norm and norm.name == self.name)

    def served(self) -> dict[str, Projection]:
        """Return the projections that read what this sparsifier lets pass, by site."""
        projections = self.block.projections()
        return {site: projections[site] for site in self.sites() if site in projections}

    def checkpoint_name(self, tensor: str) -> str:
        """Return what one of these tensors is called in a checkpoint."""
        return f"{self.name}.{tensor}" if self.kind == "activation" else f"{self.name}.sparsifier.{tensor}"


def find_places(blocks: Sequence[BlockSites], sparsity: ActivationSparsity) -> list[Place]:
    """Return where the sparsifiers go, in the order of the blocks."""
    return [place for block in blocks for place in _block_places(block, sparsity)]


def is_shared(sparsifier: Sparsifier, readers: Sequence[str]) -> bool:
    """Return whether these sites, which read one input, get one mask from this sparsifier of the first."""
    if sparsifier.correction:
        return False
    return not sparsifier.is_selection or all(site in sparsifier.sites for site in readers)


def _block_places(block: BlockSites, sparsity: ActivationSparsity) -> Iterator[Place]:
    wanted = {site: s for site in block.projections() if (s := sparsity.at(site, block.index))}
    if neuron := sparsity.at("neuron", block.index):
        name, module = block.activation.name, block.activation.module
        yield Place("activation", name, module, neuron, block.down.shape[1], 0, block)
    for norm, readers in block.shared_inputs():
        first = wanted.get(readers[0])
        if norm is not None and first is not None and is_shared(first, readers):
            yield Place("norm", norm.name, norm.module, first, block.q.shape[1], 0, block)
            wanted = {site: s for site, s in wanted.items() if site not in readers}
    projections = {block.projections()[site].name: site for site in wanted}
    for name, site in projections.items():
        projection = block.projections()[site]
        outputs, inputs = projection.shape
        yield Place("projection", name, projection.module, wanted[site], inputs, outputs, block)
