"""What `relufy measure` found of a model on a text, and what each figure means."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from relufy.document import heading
from relufy.measure.cost import Cost
from relufy.measure.counting_pass import Counted
from relufy.measure.definitions import DEFINITIONS as SPARSITIES
from relufy.measure.quality import Perplexity
from relufy.schema import finite, to_mapping

KIND = "relufy.measure"
TARGETS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
"""Sparsities that shifts are suggested for."""
SHIFTS = (0.0, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0)
"""Shifts whose sparsity is predicted."""

DEFINITIONS = {
    "sites": "share of exact zeros at each site of each layer: inputs of q k v o gate up down, behind masks; "
    "neuron is the activation's output. mean, p5 and p95 over tokens; first_token, first_percent (of each "
    "window, rounded up, first token included) and rest are means there",
    "dead": "share of neurons that are zero at every one of `tokens` tokens",
    "live_sparsity": "share of exact zeros among the neurons that are not dead",
    "unions": "share of entries that are active at any of so many tokens: consecutive ones, in runs from "
    "each window's beginning, or, for batches, random tokens of different windows",
    "hidden": "the greatest |h| of a block's output by place in the window, and the median of |h|",
    "preactivations": "what the activation gets. relu(z - shift) is zero where z <= shift: the share of "
    "such z is the sparsity predicted for a shift",
    "perplexity": "exp of the mean negative log-likelihood per predicted token; "
    "each window is predicted from its second position on",
    "macs_paper": "multiply-accumulates of linear layers and head for one token, "
    "as ReLU Strikes Back counts them (o always dense)",
    "bytes_engine": "bytes that the CPU engine reads for one token at `context` positions, by the type that "
    "weights are packed as: weights with scales and padding, lists of active entries, keys and values",
} | {name: meaning for name, meaning in SPARSITIES.items() if name != "cett_sparsity"}


@dataclass(frozen=True)
class Measurement(Counted):
    """What `measure` found. A None has its reason in `notes`."""

    model: str
    macs_paper: Cost
    bytes_engine: dict[str, Cost] | None
    """By the type that weights are packed as."""
    context: int
    notes: tuple[str, ...]

    @property
    def sparsity(self) -> dict[str, tuple[float, ...]]:
        """Site -> the mean share of exact zeros, one value per layer."""
        return {site: found.mean for site, found in self.sites.items()}

    def shifts(self, target: float) -> tuple[float, tuple[float, ...]]:
        """Return the one shift, and each layer's own, whose predicted sparsity is the target."""
        return self.preactivations.shift_for(target), self.preactivations.shifts_for(target)

    def to_json(self, shifts: Sequence[float] = SHIFTS, targets: Sequence[float] = TARGETS) -> dict[str, Any]:
        """Return the document, plain data, with the sparsities predicted for shifts, and shifts suggested for
        target sparsities; what is no number is None."""
        bytes_engine = self.bytes_engine
        sparsities = {name: getattr(self.zeros, name) for name in SPARSITIES if hasattr(self.zeros, name)}
        percentiles = {name: getattr(self.zeros, name) for name in ("model_level_p5", "model_level_p95")}
        document = {
            **heading(KIND),
            "model": self.model,
            "tokens": self.tokens,
            "windows": self.windows,
            "window": self.window,
            **sparsities,
            **percentiles,
            "sparsity": self.sparsity,
            "sites": {site: asdict(found) for site, found in self.sites.items()},
            "neurons": {site: asdict(found) for site, found in self.neurons.items()},
            "unions": asdict(self.unions),
            "hidden": asdict(self.hidden),
            "preactivations": self._preactivations(shifts, targets),
            "perplexity": _without_windows(self.perplexity),
            "dense_perplexity": self.dense_perplexity and _without_windows(self.dense_perplexity),
            "macs_paper": self.macs_paper.to_json(),
            "bytes_engine": bytes_engine and {dtype: cost.to_json() for dtype, cost in bytes_engine.items()},
            "context": self.context,
            "notes": list(self.notes),
            "definitions": DEFINITIONS,
        }
        return finite(document)

    def _preactivations(self, shifts: Sequence[float], targets: Sequence[float]) -> dict[str, Any]:
        found = self.preactivations
        suggested = [(target, *self.shifts(target)) for target in targets]
        return to_mapping(found) | {
            "predicted": [{"shift": b, "sparsity": found.sparsity(b)} for b in shifts],
            "suggested": [{"sparsity": s, "shift": shift, "shifts": own} for s, shift, own in suggested],
        }


def _without_windows(found: Perplexity) -> dict[str, Any]:
    plain = asdict(found)
    del plain["per_window"]
    return plain
