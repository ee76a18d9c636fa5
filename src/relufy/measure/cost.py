"""What a token costs in arithmetic, as ReLU Strikes Back (arXiv 2310.04564) counts it.

`macs_paper` is about arithmetic and comparable with papers. What our engine reads from memory is another
account, about speed here: bytes_read.py.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Sparsity = Mapping[str, Sequence[float]]
"""Site -> the share of zeros, one value per layer."""

LayerShapes = Mapping[str, tuple[float, int]]
"""Site -> (out, in) of its projection in a layer. Fused projections are given by their parts."""


@dataclass(frozen=True)
class DenseSparse:
    """One cost of a token in a dense model and in the measured one."""

    dense: float
    sparse: float

    @property
    def ratio(self) -> float:
        """How many times less the sparse model costs."""
        return self.dense / self.sparse


@dataclass(frozen=True)
class Cost(DenseSparse):
    """A cost of a token, and which part of it is whose."""

    parts: Mapping[str, DenseSparse]
    """By site, and what belongs to none, as `head`."""

    @property
    def without_head(self) -> DenseSparse:
        """The cost of the blocks alone."""
        return total(part for name, part in self.parts.items() if name != HEAD)

    def to_json(self) -> dict[str, Any]:
        """Return plain data: with the head, without it, and by part."""
        parts = {name: _plain(part) for name, part in self.parts.items()}
        return _plain(self) | {"without_head": _plain(self.without_head), "parts": parts}


HEAD = "head"


def total(costs: Iterable[DenseSparse]) -> DenseSparse:
    """Return the sum of costs."""
    parts = list(costs)
    return DenseSparse(math.fsum(part.dense for part in parts), math.fsum(part.sparse for part in parts))


def cost_of(parts: Mapping[str, DenseSparse]) -> Cost:
    """Return the cost that has these parts."""
    whole = total(parts.values())
    return Cost(whole.dense, whole.sparse, parts)


def macs_paper(
    layers: Sequence[LayerShapes], head: tuple[int, int], sparsity: Sparsity, has_sparse_inputs: bool
) -> Cost:
    """Return multiply-accumulates per token: every linear layer and the head (out, in), nothing else.

    q k v, gate and down skip the columns of zero inputs. In a gated MLP, up skips the rows of zero neurons
    (stage 1), or, where the inputs are sparse (`has_sparse_inputs`, stage 2), its own zero columns: the paper
    does not compound the two. It counts o as dense always, so zeros that other methods make there (TEAL,
    WINA) are not in this figure; a correction's products are not either. `bytes_engine` has both.
    """

    def share(site: str, layer: int) -> float:
        has_row_skipping = site == "up" and "gate" in layers[layer] and not has_sparse_inputs
        zeros = sparsity.get("neuron" if has_row_skipping else site, [0.0] * len(layers))[layer]
        return 1.0 if site == "o" else 1.0 - zeros

    def site_cost(site: str) -> DenseSparse:
        sizes = [(index, math.prod(shapes[site])) for index, shapes in enumerate(layers)]
        read = math.fsum(size * share(site, index) for index, size in sizes)
        return DenseSparse(float(sum(size for _, size in sizes)), read)

    parts = {site: site_cost(site) for site in layers[0]}
    return cost_of(parts | {HEAD: DenseSparse(float(math.prod(head)), float(math.prod(head)))})


def _plain(cost: DenseSparse) -> dict[str, float]:
    return {"dense": cost.dense, "sparse": cost.sparse}
