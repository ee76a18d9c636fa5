"""The automatic method: zeros chosen for this machine's engine, under a budget of perplexity.

None of the papers: it searches over sites, thresholds and centres (budget/allocate.py) by scores of what the
loss minds (budget/sensitivity.py), starts from the best single method (budget/singles.py), accepts by a bound
on a selection text (budget/bound.py), and reports on a test text that decided nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from relufy.method import Auto, Calibration
from relufy.methods.budget.bound import Rise, rise
from relufy.methods.budget.clock import Clock
from relufy.methods.budget.cost import Cost, CostModel
from relufy.methods.budget.frontier import Frontier, Point, refuse_unreachable
from relufy.methods.budget.search import run_search
from relufy.methods.budget.singles import SINGLES, Untried
from relufy.methods.budget.speed import TABLE, ReadingSpeeds
from relufy.methods.budget.texts import Texts, split
from relufy.methods.budget.trial import Trials, trials
from relufy.methods.setting import Found, Progress, Setting, no_progress
from relufy.methods.sparsify import make_setting
from relufy.recipe import Recipe

PREDICTION_ERROR = 0.005
"""Predicted times that are nearer than this are taken as equal."""


@dataclass(frozen=True)
class Report:
    """What was found, and how good it is on the text that decided nothing."""

    chosen: Point
    dense: Cost
    best_single: Point | None
    test_dense_perplexity: float
    test_perplexity: float
    test: Rise
    """Against the dense model, on the test text."""
    texts: Mapping[str, int]
    """Tokens of each."""
    speeds: ReadingSpeeds
    context: int
    minutes: float
    is_complete: bool
    """Whether the search converged before its minutes were over."""
    untried: tuple[Untried, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"speeds": self.speeds.to_json(), "texts": dict(self.texts)}


@dataclass(frozen=True)
class Search:
    """The outcome of a search, for `install` and for the reader."""

    found: Found
    recipe: Recipe
    setting: Setting
    frontier: tuple[Point, ...]
    report: Report

    def provenance(self) -> dict[str, Any]:
        """Return what a checkpoint should say of how it was made."""
        report = self.report.to_json()
        names = ("chosen", "test_dense_perplexity", "test_perplexity", "test", "texts", "speeds", "context")
        return {"search": {name: report[name] for name in names}}

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.to_mapping(),
            "report": self.report.to_json(),
            "frontier": [point.to_json() for point in self.frontier],
        }


def search(
    model: PreTrainedModel,
    texts: Texts,
    method: Auto | None = None,
    speeds: ReadingSpeeds = TABLE,
    calibration: Calibration | None = None,
    progress: Progress = no_progress,
) -> Search:
    """Search for the masks that save most within a budget; the model stays as it is.

    Raises UserError for texts that are too short or not disjoint, a model that the engine does not run or
    that has masks already, and a budget that no mask keeps.
    """
    method = method or Auto()
    texts.check(model.config.vocab_size)
    context = texts.selection.shape[1] // 2
    calibrate = calibration or Calibration(tokens=int(texts.calibration.size), seed=method.seed)
    recipe = Recipe(name="auto", sparsify=method, calibrate=calibrate)
    setting = make_setting(model, recipe, texts.calibration, progress)
    costs = CostModel(model, speeds, context, method.dtype)
    costs.spec(Found(()))  # refuses early what the engine does not run
    clock = Clock(method.minutes, progress)
    with trials(setting, costs, texts.selection, clock) as running:
        frontier = Frontier(running, math.log1p(method.budget))
        untried = run_search(frontier, running, setting, method.seed, clock)
        is_complete = clock.share < 1
        clock.until(math.inf)
        refuse_unreachable(frontier)
        chosen, found = best(frontier)
        report = _report(running, texts, frontier, chosen, found, clock, is_complete, untried)
    return Search(replace(found, notes=()), recipe, setting, tuple(frontier.points), report)


def auto(method: Auto, setting: Setting) -> Found:
    """Return what a search finds, the calibration text dealt out to its three; `search` tells more."""
    texts = split(setting.text("auto"), method.seed)
    outcome = search(setting.model, texts, method, calibration=setting.calibration, progress=setting.progress)
    return outcome.found


def best(frontier: Frontier) -> tuple[Point, Found]:
    """Return the accepted candidate of least predicted time among those that save as many bytes as the best
    single method does, of about equal ones that of the fewest bytes; where none is faster than dense, the one
    that saves most bytes."""
    single = best_single(frontier)
    most = single.bytes if single else math.inf
    allowed = [pair for pair in frontier.accepted if pair[0].bytes <= most]
    faster = [pair for pair in allowed if pair[0].time_saved > 0]
    if not faster:
        return min(allowed, key=lambda pair: pair[0].bytes)
    least = min(point.seconds for point, _ in faster)
    equal = [pair for pair in faster if pair[0].seconds <= least * (1 + PREDICTION_ERROR)]
    return min(equal, key=lambda pair: pair[0].bytes)


def best_single(frontier: Frontier) -> Point | None:
    """Return the single method's point that reads the fewest bytes within the budget."""
    points = [frontier.best_of(name) for name in SINGLES]
    return min((p for p in points if p), key=lambda p: p.bytes, default=None)


def _report(
    running: Trials,
    texts: Texts,
    frontier: Frontier,
    chosen: Point,
    found: Found,
    clock: Clock,
    is_complete: bool,
    untried: list[Untried],
) -> Report:
    dense = running.perplexity(texts.test, Found(()))
    masked = running.perplexity(texts.test, found)
    return Report(
        chosen=chosen,
        dense=running.costs.dense,
        best_single=best_single(frontier),
        test_dense_perplexity=float(np.exp(dense.mean())),
        test_perplexity=float(np.exp(masked.mean())),
        test=rise((masked - dense).tolist()),
        texts=texts.sizes(),
        speeds=running.costs.speeds,
        context=running.costs.context,
        minutes=clock.minutes,
        is_complete=is_complete,
        untried=tuple(untried),
    )
