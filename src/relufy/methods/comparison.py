"""What a comparison of methods found, as data: rows of one protocol, JSON and Markdown."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from relufy.measure.cost import DenseSparse
from relufy.measure.definitions import DEFINITIONS, ZeroSparsities
from relufy.measure.domain import Domains
from relufy.measure.overlap import Overlap
from relufy.measure.quality import Difference, Perplexity
from relufy.measure.speed import Speed
from relufy.schema import finite

COMPARISON_VERSION = 1
SAME_TEXT_SHARE = 0.01
"""The share of the evaluation text's n-grams in the calibration text from which the two are one text."""

MEANINGS = DEFINITIONS | {
    "perplexity": "exp of the mean negative log-likelihood per token that is scored; the standard error is "
    "over windows",
    "difference": "mean loss minus dense, nats per token, with its standard error, paired by window",
    "random": "control: as many entries of each token kept at each site and layer, drawn at random",
    "oracle": "control: as many kept, the greatest by |x_i| and the norm of their column of weights",
    "macs_paper": "multiply-accumulates for one token as ReLU Strikes Back counts them (o always dense, no "
    "low-rank branches)",
    "bytes_engine": "bytes that the CPU engine reads for one token at half a window of context",
    "speed": "decoding on the CPU engine in turns with dense: median tokens/s, median ratio of a turn's two",
}


@dataclass(frozen=True)
class Control:
    """The quality of a control's masks."""

    perplexity: Perplexity
    difference: Difference


@dataclass(frozen=True)
class Outcome:
    """All that was measured of a model with a method's masks, or of the dense model."""

    zeros: ZeroSparsities
    cett_sparsity: float
    perplexity: Perplexity
    difference: Difference
    macs_paper: DenseSparse
    bytes_engine: DenseSparse | None
    controls: Mapping[str, Control] = field(default_factory=dict)
    speed: Speed | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain data, the four definitions by their names."""
        zeros = asdict(self.zeros)
        sites = zeros.pop("sites")
        return {**zeros, **asdict(self), "zeros": sites}


@dataclass(frozen=True)
class Row:
    """A method at a target: its outcome, or the reason why there is none."""

    method: str
    target: float
    parameters: Mapping[str, Any] = field(default_factory=dict)
    outcome: Outcome | None = None
    reason: str = ""
    most: float | None = None
    """The greatest target that the method can reach, where that is less than all."""
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    """What it took to find the masks."""

    def to_json(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("method", "target", "parameters", "reason", "most")}
        found = self.outcome.to_json() if self.outcome else {}
        return {**own, "notes": list(self.notes), "seconds": self.seconds, **found}


@dataclass(frozen=True)
class Comparison:
    """Rows of methods at targets, on the same tokens of one text, calibrated on the same text."""

    model: str
    dense: Outcome
    rows: tuple[Row, ...]
    windows: int
    window: int
    overlap: Overlap
    domains: Domains | None
    """None where there is too little text to tell."""
    settings: Mapping[str, Any]
    texts: Mapping[str, Any]
    versions: Mapping[str, str]
    command: str = ""
    notes: tuple[str, ...] = ()

    @property
    def is_same_text(self) -> bool:
        """Whether the methods were calibrated on (a part of) the text that they are measured on."""
        return bool(self.overlap.identical_windows) or self.overlap.seen_share > SAME_TEXT_SHARE

    @property
    def overlap_line(self) -> str:
        found = self.overlap
        flag = "SAME TEXT: " if self.is_same_text else ""
        return (
            f"{flag}{found.identical_windows} of the {found.windows} windows and {found.seen_share:.2%} of "
            f"their {found.ngram}-grams are in the calibration text"
        )

    @property
    def is_same_domain(self) -> bool | None:
        """Whether the calibration text is of the evaluation text's domain; None if that is not known."""
        return self.domains.is_same if self.domains else None

    @property
    def domain_line(self) -> str:
        if self.domains is None:
            return "too little text to tell whether the calibration text is of the same domain"
        found = self.domains
        flag = "SAME DOMAIN: " if found.is_same else "another domain: "
        return (
            f"{flag}tokens are {found.ratio:.2f} times as differently distributed in the calibration text as "
            f"in the text's own halves ({found.between:.3f} and {found.within:.3f} bits)"
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain data; what is no number is None."""
        document = {
            "kind": "relufy.compare",
            "version": COMPARISON_VERSION,
            "model": self.model,
            "command": self.command,
            "settings": dict(self.settings),
            "texts": dict(self.texts),
            "windows": self.windows,
            "window": self.window,
            "overlap": asdict(self.overlap) | {"seen_share": self.overlap.seen_share},
            "is_same_text": self.is_same_text,
            "domains": asdict(self.domains) | {"ratio": self.domains.ratio} if self.domains else None,
            "is_same_domain": self.is_same_domain,
            "dense": self.dense.to_json(),
            "rows": [row.to_json() for row in self.rows],
            "notes": list(self.notes),
            "definitions": MEANINGS,
            "versions": dict(self.versions),
        }
        return finite(document)

    def to_markdown(self) -> str:
        """Return the tables, definitions and how it was made, as one Markdown document."""
        from relufy.methods.comparison_tables import markdown

        return markdown(self)
