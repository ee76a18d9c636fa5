"""Speculative decoding as data: who drafts and how much, and what came of it (csrc/speculator.h does it)."""

from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relufy.engine.reuse import Reuse
from relufy.errors import UserError

if TYPE_CHECKING:
    from relufy.engine.cpu import CpuEngine

LOOKUP, SELF = "lookup", "self"
MAX_GAMMA = 127
"""So many and one more go through the layers together."""
MIN_MATCH = 2
WINDOW, MAX_WINDOW = 32, 1 << 20


@dataclass(frozen=True)
class Speculation:
    """Who proposes tokens, which the model verifies all in one step. The text stays exact.

    `draft` is a smaller model of the same vocabulary (a packed file, a checkpoint folder, a hub id, or an
    open engine); "lookup": what followed when the text's last tokens occurred before, at least `min_match` of
    them (2); or "self": the model, limited to the neurons that the last `window` tokens (32) had active.
    `gamma` tokens are proposed at most; a model stops before a place where its likeliest token has less than
    `min_probability`. With `adaptive`, gamma is halved after a rejection and grows by two after none, up to
    `gamma`. Raises UserError for senseless values.
    """

    draft: "str | Path | CpuEngine"
    gamma: int = 4
    min_probability: float | None = None
    adaptive: bool = False
    min_match: int | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.draft, (str, Path)) and not str(self.draft):
            raise UserError('draft is empty: name a model, "lookup" or "self"')
        _check_whole("gamma", self.gamma, 1, MAX_GAMMA)
        if self.min_match is not None:
            _check_whole("min_match", self.min_match, 1, 32)
            if not self.is_lookup:
                raise UserError("min_match is for the draft lookup; a draft model matches nothing")
        if self.min_probability is not None:
            if not isinstance(self.min_probability, Real) or not 0 <= self.min_probability <= 1:
                raise UserError(
                    f"min_probability must be at least 0 and at most 1, found {self.min_probability!r}"
                )
            if self.is_lookup:
                raise UserError("min_probability is for a draft model; lookup has no probabilities")
        if self.window is not None:
            _check_whole("window", self.window, 1, MAX_WINDOW)
            if not self.is_self:
                raise UserError("window is for the draft self; others choose their neurons exactly")

    @property
    def is_lookup(self) -> bool:
        return self.draft == LOOKUP

    @property
    def is_self(self) -> bool:
        return self.draft == SELF

    @property
    def keeps(self) -> Reuse | None:
        """What a sequence must keep of its past for a draft by itself: neurons, with all tokens exact."""
        return Reuse(1, window=self.window or WINDOW) if self.is_self else None


@dataclass(frozen=True)
class SpeculationStats:
    """What the rounds of one generation came to. A round is a proposal and its verification.

    A proposed token was tested if all before it were accepted; `accepted` over `tested` is the acceptance
    rate, alpha. `union_sparsity` maps the number of tokens verified together to the share of neurons that
    none of them used, a mean over layers and rounds; for one token it is its sparsity. `bytes_by_size` maps
    it to the bytes that such a verification read: weights, keys and values, a mean too.
    """

    rounds: int
    drafted: int
    accepted: int
    chosen: int
    tested_by_place: tuple[int, ...]
    accepted_by_place: tuple[int, ...]
    rounds_by_size: dict[int, int]
    union_sparsity: dict[int, float]
    bytes_by_size: dict[int, float]
    sparsity: dict[str, list[float]]
    draft_seconds: float
    verify_seconds: float
    draft_weight_bytes: int
    draft_kv_bytes: int
    verify_weight_bytes: int
    verify_kv_bytes: int

    @property
    def tested(self) -> int:
        return sum(self.tested_by_place)

    @property
    def acceptance(self) -> float:
        """The share of tested tokens that was accepted; 0 where none was tested."""
        return self.accepted / self.tested if self.tested else 0.0

    @property
    def acceptance_by_place(self) -> tuple[float, ...]:
        """The same for the first, the second, ... proposed token, as far as there were any."""
        pairs = zip(self.accepted_by_place, self.tested_by_place, strict=True)
        return tuple(accepted / tested for accepted, tested in pairs if tested)

    @property
    def tokens_per_round(self) -> float:
        return self.chosen / self.rounds if self.rounds else 0.0

    @property
    def weight_bytes_per_token(self) -> float:
        """Bytes of weights read by drafts and verifications, for each token of the text."""
        return (self.draft_weight_bytes + self.verify_weight_bytes) / max(1, self.chosen)

    @property
    def kv_bytes_per_token(self) -> float:
        return (self.draft_kv_bytes + self.verify_kv_bytes) / max(1, self.chosen)

    def summary(self) -> str:
        """Return the acceptance and the tokens of a round, in a few words."""
        accepted = f"{self.acceptance:.0%} of {self.tested} drafted tokens accepted"
        return f"{accepted}, {self.tokens_per_round:.2f} tokens a step"

    def document(self) -> dict[str, Any]:
        """Return it as plain data, with what follows from it."""
        derived = ("tested", "acceptance", "acceptance_by_place", "tokens_per_round")
        return vars(self) | {name: getattr(self, name) for name in derived}


def as_speculation(value: Any) -> Speculation:
    """Return a Speculation, of one or of who drafts. Raises UserError for anything else."""
    if isinstance(value, Speculation):
        return value
    if isinstance(value, (str, Path)):
        return Speculation(value)
    raise UserError(f'speculation must be a Speculation, or a draft such as "lookup", found {value!r}')


def _check_whole(name: str, value: Any, least: int, most: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or not least <= int(value) <= most:
        raise UserError(
            f"{name} must be a whole number, at least {least} and at most {most}, found {value!r}"
        )
