"""What a search tried: every candidate with its cost and what it does on the selection text."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from relufy.errors import UserError
from relufy.methods.budget.cost import Cost
from relufy.methods.budget.trial import Outcome, Trials
from relufy.methods.setting import Found

LEAST_SAVED = 0.001
"""What saves less of a token's bytes is no solution."""
AIM = 0.97
"""What share of the budget a step of a climb aims at."""


@dataclass(frozen=True)
class Point:
    """One candidate on the selection text. Costs are of a token; `bound` is the upper 95 % end of `nats`."""

    method: str
    parameter: float
    """The method's `sparsity`; of the automatic one, the exchange rate."""
    is_accepted: bool
    bytes: float
    seconds: float
    bytes_saved: float
    time_saved: float
    nats: float
    standard_error: float
    bound: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Frontier:
    """All points, and the sparsifiers of the accepted ones, which save something."""

    trials: Trials
    limit: float
    """The most nats a token may cost more."""
    points: list[Point] = field(default_factory=list)
    accepted: list[tuple[Point, Found]] = field(default_factory=list)

    def look(self, method: str, parameter: float, found: Found) -> Point:
        """Try a candidate and keep its point."""
        outcome = self.trials.outcome(found)
        point = self._point(method, parameter, outcome)
        self.points.append(point)
        if point.is_accepted:
            self.accepted.append((point, found))
        return point

    def best_of(self, method: str) -> Point | None:
        """Return the accepted point of a method that reads the fewest bytes."""
        return min((p for p, _ in self.accepted if p.method == method), key=lambda p: p.bytes, default=None)

    def closest(self) -> Point | None:
        """Return the point with the smallest bound among those that save something."""
        saving = (point for point in self.points if point.bytes_saved >= LEAST_SAVED)
        return min(saving, key=lambda point: point.bound, default=None)

    def _point(self, method: str, parameter: float, outcome: Outcome) -> Point:
        saved: Cost = outcome.cost.saved(self.trials.costs.dense)
        rise = outcome.rise
        return Point(
            method=method,
            parameter=parameter,
            is_accepted=rise.bound <= self.limit and saved.bytes >= LEAST_SAVED,
            bytes=outcome.cost.bytes,
            seconds=outcome.cost.seconds,
            bytes_saved=saved.bytes,
            time_saved=saved.seconds,
            nats=rise.nats,
            standard_error=rise.standard_error,
            bound=rise.bound,
        )


@dataclass(frozen=True)
class Climb:
    """How to walk along a method's one parameter, as its logarithm: from where, how far, and with which
    power the loss is expected to grow."""

    start: float
    least: float
    most: float
    power: float
    tolerance: float = 0.02
    tries: int = 7


def climb(
    frontier: Frontier, method: str, at: Callable[[float], Found], way: Climb
) -> tuple[float, Point] | None:
    """Find the greatest parameter that is accepted; return it with its point, or None if none is.

    The next parameter is where a power law through what is known meets the limit. Raises UserError as `at`.
    """
    accepted: tuple[float, Point] | None = None
    refused: tuple[float, Point] | None = None
    x = math.log(way.start)
    for _ in range(way.tries):
        point = frontier.look(method, math.exp(x), at(math.exp(x)))
        if point.bound <= frontier.limit:
            accepted = max(accepted or (x, point), (x, point), key=lambda pair: pair[0])
        else:
            refused = min(refused or (x, point), (x, point), key=lambda pair: pair[0])
        following = _next(accepted, refused, frontier.limit, way)
        if following is None:
            break
        x = following
    if accepted is None or not accepted[1].is_accepted:
        return None
    return math.exp(accepted[0]), accepted[1]


def _next(
    accepted: tuple[float, Point] | None, refused: tuple[float, Point] | None, limit: float, way: Climb
) -> float | None:
    """Return where to look next, or None where looking on is in vain."""
    if accepted and refused:
        width = refused[0] - accepted[0]
        if width <= way.tolerance:
            return None
        low, high = (math.log(max(pair[1].bound, limit / 50)) for pair in (accepted, refused))
        part = (math.log(AIM * limit) - low) / (high - low) if high > low else 0.5
        return accepted[0] + width * min(max(part, 0.15), 0.85)
    known = accepted or refused
    assert known is not None
    step = math.log(AIM * limit / max(known[1].bound, limit / 20)) / way.power
    step = max(step, 2 * way.tolerance) if accepted else min(step, -2 * way.tolerance)
    following = min(max(known[0] + step, math.log(way.least)), math.log(way.most))
    return None if abs(following - known[0]) < way.tolerance / 2 else following


def refuse_unreachable(frontier: Frontier) -> None:
    """Raise UserError if nothing was accepted, naming what came closest."""
    if frontier.accepted:
        return
    if not frontier.points:
        raise UserError("the minutes were over before a single candidate was tried; give more with --minutes")
    closest = frontier.closest()
    reached = (
        f"the best reached is {math.expm1(closest.bound):.2g} (upper 95 % bound), with "
        f"{closest.bytes_saved:.1%} fewer bytes ({closest.method})"
        if closest
        else f"no mask saved {LEAST_SAVED:.1%} of the bytes"
    )
    raise UserError(
        f"no masks keep the perplexity's rise within {math.expm1(frontier.limit):.2g} on the selection text; "
        f"{reached}; give a larger budget, or more text for a narrower bound"
    )


def of_methods(frontier: Frontier) -> Iterator[tuple[str, Point]]:
    """Yield each method with the best of its accepted points, in the order of their first points."""
    for method in dict.fromkeys(point.method for point in frontier.points):
        if (best := frontier.best_of(method)) is not None:
            yield method, best
