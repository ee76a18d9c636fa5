"""Ridge regression in one pass: sums of products of what is seen and what is to be told from it."""

from typing import Any

import torch

from relufy.errors import UserError

RIDGE = 1e-3
"""The penalty on the weights, relative to the mean square of an input."""
MOST_BYTES = 4e9
"""What the sums of all layers may take."""


class Ridge:
    """X^T X and X^T Y in float64; X gets a one."""

    def __init__(self) -> None:
        self._squares: Any = 0.0
        self._products: Any = 0.0

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Add inputs `[positions, in]` and targets `[positions, out]`."""
        x = with_one(inputs).double()
        self._squares = self._squares + x.T @ x
        self._products = self._products + x.T @ targets.double()

    def solve(self) -> torch.Tensor:
        """Return the weights, float32 `[in + 1, out]`."""
        ridge = RIDGE * self._squares.diagonal().mean()
        identity = torch.eye(len(self._squares), dtype=torch.float64, device=self._squares.device)
        return torch.linalg.solve(self._squares + ridge * identity, self._products).float()


def with_one(x: torch.Tensor) -> torch.Tensor:
    """Return float32 inputs with a one behind them, for the constant."""
    return torch.cat([x.float(), torch.ones_like(x[..., :1], dtype=torch.float32)], dim=-1)


def refuse_large(inputs: int, outputs: int, layers: int) -> None:
    """Raise UserError if the sums of so many layers would not fit in memory."""
    if 8.0 * (inputs + 1) * (inputs + 1 + outputs) * layers > MOST_BYTES:
        raise UserError(
            f"a linear fit from {inputs} inputs to {outputs} in {layers} layers takes more than "
            f"{MOST_BYTES / 1e9:g} GB"
        )
