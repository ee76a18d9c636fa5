"""Neuron reuse: most tokens compute only neurons that were active lately. What to do, and what it did.

csrc/reuse.h does it; docs/decoding.md says which policy to choose when.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from relufy.errors import UserError
from relufy.schema import suggest

ReusePolicy = Literal["window", "prompt", "blocks", "adaptive"]
POLICIES: tuple[str, ...] = get_args(ReusePolicy)
MOST = 1 << 31


@dataclass(frozen=True)
class Reuse:
    """How the tokens after a prompt reuse neurons; the prompt itself is computed in full.

    Of each `period` tokens, the first is open: it computes all neurons. The others are frozen: they compute
    those of a set, and all others count as inactive. A period of 1 is exact (but for "blocks"). The set, by
    `policy`:

    - "window": what the last `window` tokens, up to the open one, had active.
    - "prompt": the `share` of each layer's neurons with the greatest part in the prompt's outputs (GRIFFIN).
    - "blocks": what all open tokens so far had active; `period` open ones take turns with as many frozen ones
      (ReLU Strikes Back, section 5.1). With `resets`, what the last open block had active.
    - "adaptive": as "window", and frozen tokens also compute a changing sample of one neuron in 64. A token
      opens once the set misses more than the share `most_missed` of what is active there, and after `period`
      tokens at the latest.

    With `is_control`, sets are drawn at random, as large as they would be: for measurements. Raises UserError
    for what makes no sense.
    """

    period: int = 8
    policy: ReusePolicy = "window"
    window: int = 32
    share: float = 0.5
    resets: bool = False
    most_missed: float = 0.1
    is_control: bool = False

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UserError(f"there is no reuse policy {self.policy!r}{suggest(self.policy, list(POLICIES))}")
        for name in ("period", "window"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
                raise UserError(f"the {name} of reuse must be at least 1 token, found {value!r}")
        for name in ("share", "most_missed"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must be at least 0 and at most 1, found {getattr(self, name)!r}")

    def label(self) -> str:
        """Return the settings that matter, in a few words."""
        own = {
            "window": f"window {self.window}",
            "prompt": f"prompt, share {self.share:g}",
            "blocks": "blocks that reset" if self.resets else "blocks",
            "adaptive": f"adaptive, window {self.window}, at most {self.most_missed:g} missed",
        }
        return f"{own[self.policy]}, period {self.period}{', random sets' * self.is_control}"

    def document(self) -> dict[str, Any]:
        return asdict(self)


def as_reuse(given: "Reuse | int") -> Reuse:
    """Return the settings of an option; a number stands for the period. Raises UserError."""
    return given if isinstance(given, Reuse) else Reuse(given)


@dataclass(frozen=True)
class ReuseStats:
    """What reuse did to some tokens: how many were open and frozen, and what frozen ones computed.

    `candidate_share` is the share of all neurons that a frozen token's set holds, `fired_share` the share of
    all neurons that were then active; means over tokens and layers, 0 without frozen tokens.
    """

    open_tokens: int
    frozen_tokens: int
    candidate_share: float
    fired_share: float

    def summary(self) -> str:
        """Return what changed, in a few words."""
        if not self.frozen_tokens:
            return "reuse: no frozen tokens, so the text is exact"
        return (
            f"reuse, not exact: {self.frozen_tokens} of {self.open_tokens + self.frozen_tokens} tokens "
            f"frozen, with {100 * self.candidate_share:.1f} % of the neurons as candidates and "
            f"{100 * self.fired_share:.1f} % active"
        )


def reuse_stats(counts: Mapping[str, Any], neurons: int) -> ReuseStats:
    """Return the figures of differences of an engine's `stats()`, for so many neurons a layer."""
    frozen = counts["limited"]
    total = max(1, frozen * neurons * len(counts["candidates"]))
    return ReuseStats(
        open_tokens=counts["tokens"] - frozen,
        frozen_tokens=frozen,
        candidate_share=sum(counts["candidates"]) / total,
        fired_share=sum(counts["fired"]) / total,
    )
