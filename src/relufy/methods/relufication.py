"""Relufication: ReLU Strikes Back (Mirzadeh et al., arXiv 2310.04564, ICLR 2024).

Stage 1: the MLP's activation becomes `relu(z - shift)`, z the gate's (in a plain MLP the up
projection's) output; the shift is the paper's shifted ReLU.
Stage 2: `h = x + Attn(relu(Norm1(x)))`, `y = h + FFN(relu(Norm2(h)))`; where one norm feeds both,
as in Falcon, one ReLU does.
"""

from relufy.activation_sparsity import Sparsifier
from relufy.method import Relufication
from relufy.methods.setting import Found, Setting


def relufication(method: Relufication, setting: Setting) -> Found:
    """Return the sparsifiers of a relufied model."""
    stage1 = (Sparsifier(("neuron",), "relu", shift=method.shift),)
    if method.stage == 1:
        return Found(stage1)
    mlp_inputs = ("gate", "up") if setting.is_gated else ("up",)
    return Found((*stage1, Sparsifier(("q", "k", "v"), "relu"), Sparsifier(mlp_inputs, "relu")))
