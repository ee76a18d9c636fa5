"""Relufication: ReLU Strikes Back (Mirzadeh et al., arXiv 2310.04564, ICLR 2024).

Stage 1: the MLP's activation becomes `relu(z - shift)`, z the gate's (in a plain MLP the up
projection's) output; the shift is the paper's shifted ReLU.
Stage 2: `h = x + Attn(relu(Norm1(x)))`, `y = h + FFN(relu(Norm2(h)))`; where one norm feeds both,
as in Falcon, one ReLU does.
"""

from collections.abc import Sequence

from relufy.activation_sparsity import Sparsifier
from relufy.model.structure import BlockSites
from relufy.recipe import Relufication


def relufication(method: Relufication, blocks: Sequence[BlockSites]) -> tuple[Sparsifier, ...]:
    """Return the sparsifiers of a relufied model with these blocks."""
    stage1 = (Sparsifier(("neuron",), "relu", shift=method.shift),)
    if method.stage == 1:
        return stage1
    mlp_inputs = ("gate", "up") if blocks[0].gate else ("up",)
    return (*stage1, Sparsifier(("q", "k", "v"), "relu"), Sparsifier(mlp_inputs, "relu"))
