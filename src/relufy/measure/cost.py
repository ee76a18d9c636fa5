"""What a token costs in arithmetic, as ReLU Strikes Back (arXiv 2310.04564) counts it.

`macs_paper` is about arithmetic and comparable with papers. What our engine reads from memory is another
account, about speed here: bytes_read.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


def macs_paper(
    layers: Sequence[LayerShapes], head: tuple[int, int], sparsity: Sparsity, has_sparse_inputs: bool
) -> DenseSparse:
    """Return multiply-accumulates per token: every linear layer and the head (out, in), nothing else.

    q k v, gate and down skip the columns of zero inputs. In a gated MLP, up skips the rows of zero neurons
    (stage 1), or, where the inputs are sparse (`has_sparse_inputs`, stage 2), its own zero columns: the paper
    does not compound the two. It counts o as dense always, so zeros that other methods make there (TEAL,
    WINA) are not in this figure; a correction's products are not either. `bytes_engine` has both.
    """

    def share(site: str, layer: int) -> float:
        return 1.0 - sparsity.get(site, [0.0] * len(layers))[layer]

    dense = sparse = float(head[0] * head[1])
    for index, shapes in enumerate(layers):
        has_row_skipping = "gate" in shapes and not has_sparse_inputs
        reads = {site: share(site, index) for site in shapes}
        reads |= {"o": 1.0, "up": share("neuron" if has_row_skipping else "up", index)}
        for site, (outputs, inputs) in shapes.items():
            dense += outputs * inputs
            sparse += outputs * inputs * reads[site]
    return DenseSparse(dense, sparse)
