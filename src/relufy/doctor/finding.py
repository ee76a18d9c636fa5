"""What a check of the doctor returns: a verdict in plain words, its figures, and what to try."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["good", "watch", "bad", "unchecked"]
"""Good: nothing to do. Watch: it limits what methods give. Bad: it stops them. Unchecked: see the verdict."""


@dataclass(frozen=True)
class Finding:
    """One check. `figures` is plain data; lists in it have one value per layer unless a name says else."""

    check: str
    title: str
    status: Status
    verdict: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    advice: tuple[str, ...] = ()
    """What to try, in a line each; commands begin with "relufy"."""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def percent(share: float, digits: int = 1) -> str:
    """Return a share as a person reads it."""
    return f"{100 * share:.{digits}f} %"


def rise(nats: float) -> float:
    """Return the rise of a perplexity as a share of it, from a loss difference in nats per token."""
    from math import expm1

    return expm1(min(nats, 50.0))


def signed(nats: float) -> str:
    """Return a rise of the perplexity in percent, or in times where that reads better."""
    share = rise(nats)
    return f"{share + 1:.3g} times the perplexity" if share >= 3 else f"{100 * share:+.2f} % perplexity"


def listed(layers: list[int]) -> str:
    """Return "layer 3" or "layers 0, 1 and 5 more"."""
    shown = ", ".join(map(str, layers[:6])) + (f" and {len(layers) - 6} more" if len(layers) > 6 else "")
    return f"layer{'s' * (len(layers) > 1)} {shown}"
