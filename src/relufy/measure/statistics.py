"""Means with their standard errors, alone and in pairs; no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """How much more one figure is than another on the same windows or documents, with its standard error."""

    mean: float
    standard_error: float


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of independent values and its standard error, NaN for a single one."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def difference_of_pairs(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Return `first - second` with its paired standard error. Raises ValueError unless they are pairs."""
    if len(first) != len(second):
        raise ValueError(f"{len(first)} windows cannot be paired with {len(second)}")
    return Difference(*mean_and_error([a - b for a, b in zip(first, second, strict=True)]))
