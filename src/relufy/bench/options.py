"""What the benchmarks of a model are asked to do."""

from dataclasses import dataclass, replace
from pathlib import Path

from relufy.bench.densities import Densities
from relufy.bench.llama_cpp import MATCHING
from relufy.bench.shapes import MAX_CONTEXT, find_shape
from relufy.engine.reuse import Reuse
from relufy.engine.speculation import Speculation
from relufy.errors import UserError

OF_SHAPES = ("mlp_density", "input_density", "window_union", "candidate_density")
AGAINST = ("llama.cpp", "none")


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Either a shape, filled with random weights to have the densities, or a model as it is.

    `load` copies our files into huge pages instead of mapping them. Raises UserError if an option makes no
    sense.
    """

    shape: str | None = None
    model: str | None = None
    dtype: str = "int8"
    mlp_density: float | None = None
    input_density: float | None = None
    threads: int | None = None
    against: str = "llama.cpp"
    turns: int = 7
    load: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.shape is None) == (self.model is None):
            raise UserError("give either --shape or --model, one of the two")
        if self.shape is not None:
            find_shape(self.shape)
        elif any(getattr(self, name, None) is not None for name in OF_SHAPES):
            raise UserError("densities are for --shape; the zeros of --model are its own")
        if self.dtype not in MATCHING:
            raise UserError(f"--dtype must be one of {', '.join(MATCHING)}, found {self.dtype!r}")
        if self.against not in AGAINST:
            raise UserError(f"--against must be one of {', '.join(AGAINST)}, found {self.against!r}")
        for name in ("turns", "tokens", "context"):
            if getattr(self, name, 1) < 1:
                raise UserError(f"--{name} must be at least 1, found {getattr(self, name)}")
        if self.shape is not None and self.positions > MAX_CONTEXT:
            raise UserError(
                f"this takes {self.positions} positions, random models have {MAX_CONTEXT}; "
                "ask for fewer tokens"
            )
        _ = self.densities

    @property
    def densities(self) -> Densities:
        return Densities(0.1 if self.mlp_density is None else self.mlp_density, self.input_density)

    @property
    def pack_for(self) -> str:
        """What the sparse contender's file is packed for."""
        return "exact" if getattr(self, "reuse", None) is None else "reuse"

    @property
    def positions(self) -> int:
        """How many positions a sequence comes to have."""
        raise NotImplementedError

    @property
    def sequences(self) -> int:
        """How many sequences there are at most."""
        return 1

    @property
    def density_context(self) -> int:
        """The context at which a shape's thresholds give the densities."""
        raise NotImplementedError

    @property
    def extent(self) -> str:
        """How many tokens are meant, in a few words."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """What is run, in a few words."""
        if self.model is not None:
            return f"{Path(self.model).name} {self.dtype}, {self.extent}"
        inputs = "" if self.input_density is None else f", inputs {self.input_density:g}"
        return f"{self.shape} {self.dtype}, MLP {self.densities.neurons:g}{inputs}, {self.extent}"


@dataclass(frozen=True, kw_only=True)
class DecodeOptions(BenchOptions):
    """In each turn a contender writes `tokens` tokens, one at a time, after a prompt of `context` tokens."""

    context: int = 256
    tokens: int = 32
    reuse: Reuse | None = None
    window_union: float | None = None
    predictor: int | None = None
    """The rank of a shape's random predictor; 0 is a model's own."""
    candidate_density: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.predictor is not None and (self.predictor == 0) != (self.model is not None):
            raise UserError("--predictor is rank=N for --shape, and on for --model, which has its own")
        if self.candidate_density is not None and not self.predictor:
            raise UserError("--candidate-density is for --shape with --predictor rank=N")
        if self.predictor is not None and (self.reuse is not None or self.window_union is not None):
            raise UserError("a predictor and reuse decide on the same neurons; choose one of the two")

    @property
    def pack_for(self) -> str:
        return "predictor" if self.predictor is not None else super().pack_for

    @property
    def positions(self) -> int:
        return self.context + self.tokens

    @property
    def densities(self) -> Densities:
        if not self.predictor:
            return replace(super().densities, union=self.window_union)
        density = 0.15 if self.candidate_density is None else self.candidate_density
        return replace(super().densities, candidates=density, rank=self.predictor)

    @property
    def label(self) -> str:
        union = "" if self.window_union is None else f", union {self.window_union:g}"
        reuse = "" if self.reuse is None else f", reuse: {self.reuse.label()}"
        return super().label + union + reuse + self._prediction

    @property
    def _prediction(self) -> str:
        if self.predictor is None:
            return ""
        densities, rank = self.densities, f" of rank {self.predictor}" * bool(self.predictor)
        candidates = "" if densities.candidates is None else f", candidates {densities.candidates:g}"
        return f", predictor{rank}{candidates}"

    @property
    def density_context(self) -> int:
        return self.context

    @property
    def extent(self) -> str:
        return f"context {self.context}"


@dataclass(frozen=True, kw_only=True)
class PrefillOptions(BenchOptions):
    """In each turn a contender reads a prompt of `tokens` tokens."""

    tokens: int = 512

    @property
    def positions(self) -> int:
        return self.tokens

    @property
    def density_context(self) -> int:
        """The middle of the prompt."""
        return max(1, self.tokens // 2)

    @property
    def extent(self) -> str:
        return f"{self.tokens} tokens"


@dataclass(frozen=True, kw_only=True)
class BatchOptions(DecodeOptions):
    """In each turn, and for each number of sequences in `batch`, `tokens` tokens are added to each sequence.

    A step adds one token to every sequence. Sequences have texts of their own, of `context` tokens at most.
    """

    batch: tuple[int, ...] = (1, 2, 4, 8, 16)
    tokens: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.batch or min(self.batch) < 1 or len(set(self.batch)) < len(self.batch):
            found = ",".join(str(size) for size in self.batch)
            raise UserError(f"--batch takes different numbers of sequences, such as 1,2,4, found {found!r}")

    @property
    def sequences(self) -> int:
        return max(self.batch)


@dataclass(frozen=True, kw_only=True)
class SpeculativeOptions(DecodeOptions):
    """In each turn a contender continues a passage of `text`, plainly or with drafts of one of `gammas`.

    `draft` is a packed file, a checkpoint, "lookup" or "self".
    """

    draft: str
    text: str
    gammas: tuple[int, ...] = (2, 4, 8, 16)
    temperature: float = 0.0
    against: str = "none"
    tokens: int = 96

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None:
            raise UserError("speculation is measured on a real model: random weights agree with no draft")
        if self.against != "none":
            raise UserError("speculation is measured against our own plain decoding; leave --against out")
        if not self.gammas or len(set(self.gammas)) < len(self.gammas):
            raise UserError("--gammas takes different numbers of tokens, such as 2,4,8")
        for gamma in self.gammas:
            Speculation(self.draft, gamma)

    @property
    def extent(self) -> str:
        return f"draft {Path(self.draft).name}, context {self.context}"
