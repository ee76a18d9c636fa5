"""A seeded (mu + lambda) evolution of numbers between 0 and 1, one for each of many places.

The best of parents and children are the next parents, so what is found is never worse than the start.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

Place = TypeVar("Place")

LEAST_STEP, MOST_STEP = 0.05, 0.1
MUTATED = 0.2
"""The share of places that a mutation changes."""
CHILDREN_PER_PARENT = 4


def evolve(
    starts: Sequence[tuple[float, Mapping[Place, float]]],
    loss: Callable[[Mapping[Place, float]], float],
    population: int,
    generations: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> tuple[dict[Place, float], float]:
    """Return the numbers of the least loss that was found, and that loss.

    `starts` are the first parents, each with its loss. Each generation tries `population` children; every
    child is a parent with some of its numbers moved by 0.05 to 0.1 (R-Sparse, arXiv 2504.19449, section 4.3).
    """
    random = np.random.default_rng(seed)
    num_parents = max(1, population // CHILDREN_PER_PARENT)
    total = generations * population
    ranked = sorted([(of, dict(start)) for of, start in starts], key=_rank)[:num_parents]
    for generation in range(generations):
        children = []
        for child in range(population):
            mutated = _mutated(ranked[random.integers(len(ranked))][1], random)
            children.append((loss(mutated), mutated))
            progress(generation * population + child + 1, total)
        ranked = sorted(ranked + children, key=_rank)[:num_parents]
    return ranked[0][1], ranked[0][0]


def _rank(tried: tuple[float, dict]) -> float:
    """Return a loss to sort by; what is no number comes last."""
    return math.inf if math.isnan(tried[0]) else tried[0]


def _mutated(parent: Mapping[Place, float], random: np.random.Generator) -> dict[Place, float]:
    child = dict(parent)
    count = max(1, round(MUTATED * len(child)))
    places = list(child)
    for index in random.choice(len(places), min(count, len(places)), replace=False):
        step = random.uniform(LEAST_STEP, MOST_STEP) * random.choice((-1, 1))
        value = child[places[index]]
        inside = value + step if 0 <= value + step <= 1 else value - step
        child[places[index]] = min(max(inside, 0.0), 1.0)
    return child
