"""x * sigmoid(beta x), the activations between SiLU (beta 1) and ReLU (arXiv 2310.04564, section 3.1).

Beta 1.702 is within 0.0205 of the exact GELU. The least value is -0.2785 / beta.
"""

import torch
from torch import nn
from transformers.activations import ACT2CLS, ACT2FN

PREFIX = "beta-silu:"
BETAS = (1.702, *range(2, 33))
"""Those that have a name, which is what a checkpoint's config.json holds."""


class BetaSiLU(nn.Module):
    """`x * sigmoid(beta * x)`."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.beta * x)

    def extra_repr(self) -> str:
        return f"beta={self.beta:g}"


def register_beta_silu() -> None:
    """Tell transformers of "beta-silu:1.702" and "beta-silu:2" to "beta-silu:32". Twice is harmless."""
    for beta in BETAS:
        for known in (ACT2CLS, ACT2FN):
            known[f"{PREFIX}{beta:g}"] = (BetaSiLU, {"beta": float(beta)})
