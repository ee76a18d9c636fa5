"""The search: climbs of the automatic allocation and of every single method, then corrections."""

from dataclasses import dataclass, field

from relufy.methods.budget.allocate import Allocator, Choice, Layout, as_found
from relufy.methods.budget.clock import Clock, TimeUp
from relufy.methods.budget.cost import Place
from relufy.methods.budget.frontier import Climb, Frontier, climb
from relufy.methods.budget.options import Option, Prices, Weighting, find_options
from relufy.methods.budget.refine import refined
from relufy.methods.budget.singles import Untried, try_singles
from relufy.methods.budget.trial import Trials
from relufy.methods.setting import Setting

VARIANTS: tuple[tuple[Weighting, Layout], ...] = (
    ("time", "best"),
    ("bytes", "best"),
    ("bytes", "inputs"),
    ("bytes", "neurons"),
)
SINGLES_UNTIL = 0.6
"""The share of the minutes after which no single method is tried any more."""
ROUNDS = 4
"""Corrections of each variant at most."""
LEAST_FACTOR, MOST_FACTOR = 1e-6, 1e6
"""How far from the first guess the exchange rate is looked for."""


@dataclass
class Automatic:
    """The automatic allocation with one weighting and layout, and how far it was brought."""

    weighting: Weighting
    layout: Layout
    prices: Prices
    factors: dict[Place, float] = field(default_factory=dict)
    exchange: float | None = None
    """The greatest rate that was accepted."""

    @property
    def name(self) -> str:
        layout = "" if self.layout == "best" else f"-{self.layout}"
        return f"auto-{self.weighting}{layout}"

    def allocator(self, options: dict[Place, Option]) -> Allocator:
        return Allocator(options, self.prices, self.factors, self.layout)

    def climb(self, frontier: Frontier, options: dict[Place, Option], tries: int) -> bool:
        """Climb to the budget; return whether a better point was found."""
        allocator, before = self.allocator(options), _least(frontier, self)
        start = allocator.exchange_for(frontier.limit)
        way = Climb(start, start * LEAST_FACTOR, start * MOST_FACTOR, power=1.0, tries=tries)
        found = climb(frontier, self.name, lambda x: as_found(_masks(allocator.choose(x))), way)
        if found is not None:
            self.exchange = found[0]
        return _least(frontier, self) < before


def run_search(
    frontier: Frontier, trials: Trials, setting: Setting, seed: int, clock: Clock
) -> list[Untried]:
    """Fill a frontier until the search converges or its minutes are over; return what was not tried."""
    untried: list[Untried] = []
    try:
        options = find_options(setting, trials.costs, seed, clock)
        streams = trials.costs.streams()
        variants = [
            Automatic(weighting, layout, Prices(trials.costs, streams, weighting))
            for weighting, layout in VARIANTS
        ]
        for variant in variants[:2]:
            variant.climb(frontier, options, tries=7)
        clock.until(SINGLES_UNTIL)
        untried = try_singles(frontier, setting, clock)
        clock.until(1.0)
        for variant in variants[2:]:
            variant.climb(frontier, options, tries=6)
        _correct(frontier, trials, variants, options)
    except TimeUp:
        clock.until(float("inf"))
    return untried


def _correct(
    frontier: Frontier, trials: Trials, variants: list[Automatic], options: dict[Place, Option]
) -> None:
    """Correct the best variant of each weighting as long as that helps; the second starts where the first
    ended, since factors are of the model's masks, not of their price."""
    shared: dict[Place, float] = {}
    for weighting in ("bytes", "time"):
        own = [v for v in variants if v.weighting == weighting and v.exchange is not None]
        if not own:
            continue
        best = min(own, key=lambda variant: _least(frontier, variant))
        if shared:
            best.factors = dict(shared)
            best.climb(frontier, options, tries=6)
        for _ in range(ROUNDS):
            assert best.exchange is not None
            choices, before = best.allocator(options).choose(best.exchange), best.factors
            best.factors = refined(trials, choices, best.prices, before)
            if not best.climb(frontier, options, tries=6):
                best.factors = before
                break
        shared = best.factors


def _masks(choices: list[Choice]) -> list:
    return [choice.chosen for choice in choices]


def _least(frontier: Frontier, variant: Automatic) -> float:
    """Return the least price that the variant was accepted at."""
    points = [point for point, _ in frontier.accepted if point.method == variant.name]
    price = (lambda p: p.bytes) if variant.weighting == "bytes" else (lambda p: p.seconds)
    return min(map(price, points), default=float("inf"))
