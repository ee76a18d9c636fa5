"""Sparsification methods as data: one frozen dataclass for each paper. Knows no torch.

The type is what `relufy.sparsify` dispatches on, METHODS has the names that they have in YAML. What each one
does is in the module of the same name in `relufy/methods/`.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from relufy.activation_sparsity import HELU_WIDTH
from relufy.errors import UserError


@dataclass(frozen=True)
class Calibration:
    """What of a text a method looks at. The first position of a window is never counted: it is the
    beginning-of-sequence token, or the attention sink that takes its place."""

    tokens: int = 20_480
    """Positions to run at most; windows are drawn from all of the text."""
    window: int = 256
    """Tokens in a window, with the beginning-of-sequence token that opens it."""
    batch_size: int = 8
    """Windows that run side by side."""
    seed: int = 0
    keep_massive: bool = False
    """Count positions with massive activations too (arXiv 2402.17762: a hidden state with a value above 100
    and above 1000 times the median magnitude)."""

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.window < 2:
            raise UserError(f"window must be at least 2 tokens, found {self.window}")
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"seed must be between 0 and 2**32 - 1, found {self.seed}")


@dataclass(frozen=True)
class Relufication:
    """ReLU Strikes Back (arXiv 2310.04564), sections 4 and 5, with any activation that makes exact zeros.

    Stage 1 swaps the MLP's activation for `relu(x - shift)`, or what `activation` names. Stage 2 also puts a
    ReLU on the shared input of q, k, v and on the shared input of gate and up, after those norms.
    """

    stage: Literal[1, 2] = 1
    shift: float = 0.0
    activation: Literal["relu", "helu", "relu2", "drelu"] = "relu"
    """helu is ReLU with another gradient (arXiv 2411.10573), relu2 its square (arXiv 2402.03804), drelu a
    ReLU on gate and up (arXiv 2406.05955)."""
    sparsity: float | None = None
    """Take the shift from a text: this share of the pre-activations lies below it, as a mean over layers."""
    per_layer: bool = False
    """Each layer gets the shift that gives it this sparsity, instead of all of them one."""
    width: float = HELU_WIDTH
    """How far below the shift a HeLU still lets gradients through (the paper's alpha)."""

    def __post_init__(self) -> None:
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise UserError(f"sparsity must lie between 0 and 1, found {self.sparsity}")
        if self.sparsity is not None and self.shift:
            raise UserError("give a shift or the sparsity that it is taken from, not both")
        if self.activation == "drelu" and (self.shift or self.sparsity is not None):
            raise UserError("drelu has no shift, so neither shift nor sparsity can be set")
        if self.per_layer and self.sparsity is None:
            raise UserError("per_layer needs the sparsity that every layer's shift is taken from")
        if self.activation != "helu" and self.width != HELU_WIDTH:
            raise UserError(f"width belongs to helu; {self.activation} has none")
        if not (math.isfinite(self.shift) and 0 <= self.width < math.inf):
            raise UserError(
                f"shift must be finite and width 0 or greater, found {self.shift} and {self.width}"
            )

    @property
    def needs_text(self) -> bool:
        """Whether it looks at a text."""
        return self.sparsity is not None


@dataclass(frozen=True, kw_only=True)
class Selecting:
    """What every calibrated method has. `sparsity` is the paper's own target; its docstring says of what."""

    needs_text: ClassVar[bool] = True

    sparsity: float = 0.5
    phase: Literal["all", "decode"] = "all"
    """"decode" leaves the tokens of the prompt dense."""
    dense_first_tokens: int = 0
    """Tokens at positions below this stay dense."""

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, value in given.items():
            if value is None:
                continue
            is_share = name.startswith("sparsity") or name == "step"
            if is_share and not 0 < value < 1:
                raise UserError(f"{name} must lie between 0 and 1, found {value}")
            if name == "most" and not 0 < value <= 1:
                raise UserError(f"most must be above 0 and at most 1, found {value}")
        if self.dense_first_tokens < 0:
            raise UserError(f"dense_first_tokens must be 0 or greater, found {self.dense_first_tokens}")


@dataclass(frozen=True, kw_only=True)
class Teal(Selecting):
    """TEAL (arXiv 2408.14690): a magnitude threshold at the input of each projection.

    `sparsity` is the share of the blocks' linear weights that is not read. "greedy" allocates it within a
    block by the paper's algorithm 1, "uniform" gives each projection the same.
    """

    allocation: Literal["greedy", "uniform"] = "greedy"
    step: float = 0.05
    """What a greedy step gives to a projection of hidden x hidden weights; larger ones get less."""
    most: float = 0.9
    """The most that a projection gets."""


@dataclass(frozen=True, kw_only=True)
class Cats(Selecting):
    """CATS (arXiv 2404.08763): one threshold a layer on the magnitude of the activation's output.

    `sparsity` is the share of neurons that are skipped; the gate itself stays dense. Needs a gated MLP.
    """


@dataclass(frozen=True, kw_only=True)
class Chess(Selecting):
    """CHESS (arXiv 2409.01366): a threshold for each neuron, from its mean |up|; with `attention` also
    thresholds at the inputs of q and o, while k and v stay dense.

    `sparsity` is the share skipped at each of these sites. Needs a gated MLP.
    """

    attention: bool = True


@dataclass(frozen=True, kw_only=True)
class Wina(Selecting):
    """WINA (arXiv 2505.19427): entries of each projection's input by `|x_i| * norm(W[:, i])`.

    `sparsity` is the share of the blocks' linear weights that is not read.
    """

    select: Literal["threshold", "topk"] = "threshold"
    """Threshold on the score, or the k greatest scores of each token."""
    allocation: Literal["greedy", "uniform"] = "greedy"
    step: float = 0.05
    most: float = 0.9


@dataclass(frozen=True, kw_only=True)
class RSparse(Selecting):
    """R-Sparse (arXiv 2504.19449): thresholds, and a low-rank branch for what they leave out.

    `sparsity` is the share of each projection's weights that is not read, the branch's own weights counted as
    read; `channels` (the paper's alpha) is the share of the budget that goes to channels, the rest to the
    branch. The search finds it for each projection.
    """

    channels: float = 1.0
    search: bool = True
    population: int = 8
    """Splits that are tried in a generation of the search."""
    generations: int = 6
    windows: int = 16
    """Calibration windows that the search looks at the loss of."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.channels <= 1:
            raise UserError(f"channels must lie between 0 and 1, found {self.channels}")
        for name in ("population", "generations", "windows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, found {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Scap(Selecting):
    """SCAP (arXiv 2412.07174): thresholds around a centre at the inputs of the MLP's projections.

    `sparsity` is that of the input of gate and up, `sparsity_down` that of the input of down.
    """

    sparsity: float = 0.35
    sparsity_down: float = 0.55
    centre: Literal["best", "zero", "median", "mode"] = "best"
    """"best" is the one whose output error is least."""


@dataclass(frozen=True, kw_only=True)
class FatRelu(Selecting):
    """FATReLU (arXiv 2402.13516, section 3.3) on a model with ReLU: `z where z >= threshold`.

    `sparsity` is the share of zero neurons wanted, per layer; a layer that has it already keeps its ReLU.
    Without a threshold it is 0.9.
    """

    sparsity: float | None = None  # type: ignore[assignment]
    threshold: float | None = None
    """Instead: one threshold for all layers, which needs no text. The paper's is 0.01."""

    def __post_init__(self) -> None:
        if self.sparsity is None and self.threshold is None:
            object.__setattr__(self, "sparsity", 0.9)
        super().__post_init__()
        if self.threshold is None:
            return
        if self.sparsity is not None:
            raise UserError(
                "fatrelu has a sparsity, from which each layer's threshold follows, or one threshold for "
                "all; set the other to null"
            )
        if not 0 < self.threshold < math.inf:
            raise UserError(f"threshold must be a finite number above 0, found {self.threshold}")

    @property
    def needs_text(self) -> bool:  # type: ignore[override]
        return self.threshold is None


@dataclass(frozen=True, kw_only=True)
class GreedySequential(Selecting):
    """Greedy sequential thresholds (arXiv 2501.16337, on any decoder): site after site, each as sparse as the
    loss on the calibration text allows. `sparsity` is the most that a site gets."""

    sparsity: float = 0.9
    loss_increase: float = 1.0006
    """The factor that the loss may grow by at each accepted step."""
    step: float = 0.1
    """The first sparsity that is tried at a site, and what each further try adds."""
    loss_tokens: int = 4096
    """Tokens of the calibration text that the loss is measured on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.loss_increase < 2:
            raise UserError(
                f"loss_increase is a factor of at least 1 and below 2, found {self.loss_increase}"
            )
        if self.loss_tokens < 1:
            raise UserError(f"loss_tokens must be at least 1, found {self.loss_tokens}")


@dataclass(frozen=True, kw_only=True)
class LaRoSA(Selecting):
    """LaRoSA (arXiv 2507.01299): top-k of the inputs in the basis of their principal components.

    A reference for quality: the rotation is computed for each token, so there is no fast path here.
    `sparsity` is the share of the inputs' entries left out.
    """


@dataclass(frozen=True, kw_only=True)
class Auto:
    """The automatic one: sites, thresholds and centres such that the engine's predicted time for a token is
    least while the perplexity rises by no more than the budget."""

    needs_text: ClassVar[bool] = True

    budget: float = 0.01
    """How much the perplexity may rise, as a share of it: 0.01 is 1 %."""
    minutes: float = 10.0
    """What the search may take. A search that this does not end is repeatable."""
    seed: int = 0
    dtype: str = "f32"
    """How the model will be packed for the engine."""

    def __post_init__(self) -> None:
        if not 0 < self.budget < 10:
            raise UserError(
                f"budget is a share of the perplexity above 0, as 0.01 for 1 %, found {self.budget}"
            )
        if not 0 < self.minutes < float("inf"):
            raise UserError(f"minutes must be above 0, found {self.minutes}")
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"seed must be between 0 and 2**32 - 1, found {self.seed}")


METHODS: dict[str, type] = {
    "relufication": Relufication,
    "teal": Teal,
    "cats": Cats,
    "chess": Chess,
    "wina": Wina,
    "rsparse": RSparse,
    "scap": Scap,
    "fatrelu": FatRelu,
    "greedy": GreedySequential,
    "larosa": LaRoSA,
    "auto": Auto,
}
"""Sparsification methods by the name that they have in YAML and on the command line."""


def method_name(method: Any) -> str:
    """Return the name of a method's parameters. Raises UserError for what is no method."""
    for name, cls in METHODS.items():
        if type(method) is cls:
            return name
    raise UserError(f"expected the parameters of a method, found {type(method).__name__}")
