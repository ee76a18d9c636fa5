"""What a decode benchmark is asked to do."""

from dataclasses import dataclass
from pathlib import Path

from relufy.bench.densities import Densities
from relufy.bench.llama_cpp import MATCHING
from relufy.bench.shapes import find_shape
from relufy.errors import UserError

AGAINST = ("llama.cpp", "none")


@dataclass(frozen=True)
class DecodeOptions:
    """Either a shape, filled with random weights to have the densities, or a model as it is.

    In each of `turns` turns a contender writes `tokens` tokens after a prompt of `context` tokens. `load`
    copies our files into huge pages instead of mapping them. Raises UserError if an option makes no sense.
    """

    shape: str | None = None
    model: str | None = None
    dtype: str = "int8"
    mlp_density: float | None = None
    input_density: float | None = None
    threads: int | None = None
    context: int = 256
    against: str = "llama.cpp"
    turns: int = 7
    tokens: int = 32
    load: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.shape is None) == (self.model is None):
            raise UserError("give either --shape or --model, one of the two")
        if self.shape is not None:
            find_shape(self.shape)
        elif self.mlp_density is not None or self.input_density is not None:
            raise UserError("densities are for --shape; the zeros of --model are its own")
        if self.dtype not in MATCHING:
            raise UserError(f"--dtype must be one of {', '.join(MATCHING)}, found {self.dtype!r}")
        if self.against not in AGAINST:
            raise UserError(f"--against must be one of {', '.join(AGAINST)}, found {self.against!r}")
        for name in ("context", "turns", "tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, found {getattr(self, name)}")
        _ = self.densities

    @property
    def densities(self) -> Densities:
        return Densities(0.1 if self.mlp_density is None else self.mlp_density, self.input_density)

    @property
    def label(self) -> str:
        """What is run, in a few words."""
        if self.model is not None:
            return f"{Path(self.model).name} {self.dtype}, context {self.context}"
        inputs = "" if self.input_density is None else f", inputs {self.input_density:g}"
        return f"{self.shape} {self.dtype}, MLP {self.densities.neurons:g}{inputs}, context {self.context}"
