"""The acceptance test of the automatic search: an upper bound of what masks cost on the selection text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

from relufy.errors import UserError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Rise:
    """How much more a token costs than in the dense model, nats, over the same windows.

    `bound` is the upper end of the one-sided 95 % interval of Student's t, windows being the units.
    """

    nats: float
    standard_error: float
    bound: float
    windows: int

    def of_perplexity(self) -> float:
        """Return the bound as a share of the perplexity: 0.01 is 1 %."""
        return math.expm1(self.bound)


def rise(per_window: Sequence[float]) -> Rise:
    """Return the rise from each window's mean difference to the dense model; there must be two or more."""
    mean, error = fmean(per_window), stdev(per_window) / math.sqrt(len(per_window))
    return Rise(mean, error, mean + student_t(len(per_window) - 1) * error, len(per_window))


def student_t(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Return the quantile of Student's t, by Cornish and Fisher's expansion about the normal's
    (Abramowitz and Stegun 26.7.5): right to 0.001 from 7 degrees of freedom on."""
    z, n = NormalDist().inv_cdf(confidence), degrees
    terms = (
        (z**3 + z) / 4 / n,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96 / n**2,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384 / n**3,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160 / n**4,
    )
    return z + sum(terms)


def parse_budget(text: str) -> float:
    """Return the share that "1%" or "0.01" means. Raises UserError for what is no share above 0."""
    number = text.strip()
    try:
        share = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError:
        raise UserError(f"--budget takes a share of the perplexity, as 1% or 0.01, found {text!r}") from None
    if not 0 < share < 10:
        raise UserError(f"--budget must be above 0 and below 1000 %, found {text!r}")
    return share
