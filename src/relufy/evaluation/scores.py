"""One metric of one task for one model, document by document, and the standard error that follows from it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from relufy.evaluation.chance import Chance
from relufy.measure.statistics import mean_and_error

Kind = Literal["mean", "perplexity", "weighted_perplexity", "bits_per_unit", "other"]
"""How documents are aggregated: their mean; exp of the mean loss; exp of all loss over all units (bytes,
words, tokens), or that in bits; anything else."""

RESAMPLES = 200


@dataclass(frozen=True)
class Scores:
    """What each document gives: a number, or (log-likelihood, units), or what only `aggregate` understands.

    `documents` are fingerprints of documents and prompts: equal ones can be compared in pairs.
    """

    name: str
    metric: str
    kind: Kind
    items: tuple[Any, ...]
    documents: tuple[str, ...]
    aggregate: Callable[[list[Any]], float]
    higher_is_better: bool = True
    chance: Chance | None = None
    filter: str = "none"

    @cached_property
    def value(self) -> float:
        return float(self.aggregate(list(self.items)))

    @cached_property
    def standard_error(self) -> float:
        """Over documents: NaN for a single one."""
        if len(self.items) < 2:
            return math.nan
        if self.kind != "other":
            return mean_and_error(self.influences())[1]
        generator = np.random.default_rng(0)
        draws = generator.integers(len(self.items), size=(RESAMPLES, len(self.items))).tolist()
        return float(np.std([self.aggregate([self.items[i] for i in drawn]) for drawn in draws], ddof=1))

    @property
    def is_binary(self) -> bool:
        return self.kind == "mean" and all(item in (0, 1) for item in self.items)

    @property
    def is_share(self) -> bool:
        """Whether it is a mean of numbers from 0 to 1, whose hundredths are called points."""
        return self.kind == "mean" and all(0 <= item <= 1 for item in self.items)

    @property
    def test_name(self) -> tuple[str, str, str]:
        """What the paired test looks at: several perplexities of a task have the same log-likelihoods."""
        is_likelihood = self.kind not in ("mean", "other")
        return self.name, self.filter, "likelihood" if is_likelihood else self.metric

    def tested(self) -> np.ndarray:
        """Return what the two models are compared by, for each document: a score or a log-likelihood."""
        if self.kind in ("mean", "perplexity"):
            return np.array(self.items, dtype=np.float64)
        return np.array([likelihood for likelihood, _ in self.items], dtype=np.float64)

    def influences(self) -> list[float]:
        """Return one number for each document whose mean is `value` and whose error is the value's.

        Of a ratio they are the first-order ones (the delta method).
        """
        if self.kind == "mean":
            return [float(item) for item in self.items]
        if self.kind == "perplexity":
            nats, units = -self.tested(), np.ones(len(self.items))
        else:
            nats, units = -self.tested(), np.array([units for _, units in self.items], dtype=np.float64)
        rate = nats.sum() / units.sum()
        slope = 1 / math.log(2) if self.kind == "bits_per_unit" else self.value
        return (self.value + slope * (nats - rate * units) / units.mean()).tolist()


def per_unit(items: Sequence[tuple[float, float]]) -> float:
    """Return the loss in nats for each unit, of (log-likelihood, units) pairs."""
    return -math.fsum(nats for nats, _ in items) / math.fsum(units for _, units in items)


def perplexity_per_unit(items: Sequence[tuple[float, float]]) -> float:
    return math.exp(per_unit(items))


def bits_per_unit(items: Sequence[tuple[float, float]]) -> float:
    return per_unit(items) / math.log(2)


def pooled(name: str, tasks: Sequence[Sequence[Scores]]) -> list[Scores]:
    """Return a group's scores, all documents of its tasks together, for each metric that all of them have."""
    found = []
    for first in tasks[0]:
        parts = [scores for task in tasks for scores in task if scores.metric == first.metric]
        if len(parts) == len(tasks) and all(part.kind == first.kind for part in parts):
            found.append(_pool(name, parts))
    return found


def _pool(name: str, parts: Sequence[Scores]) -> Scores:
    chances = [part.chance for part in parts if part.chance is not None]
    together = tuple(p for chance in chances for p in chance.probabilities)
    return replace(
        parts[0],
        name=name,
        items=tuple(item for part in parts for item in part.items),
        documents=tuple(f"{part.name}:{document}" for part in parts for document in part.documents),
        chance=Chance(together) if len(chances) == len(parts) else None,
    )
