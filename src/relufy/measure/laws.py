"""How the share of active neurons changes with training: laws of Sparsing Law (arXiv 2411.02335, section 4).

D is the number of training tokens in 1e9, A the activation ratio, 1 - sparsity:

    falling (ReLU):  A(D) = exp(-c D^alpha + b) + A0     more data, sparser
    rising (SiLU):   A(D) = A0 - c / D^alpha             more data, denser

Fitted by least squares (scipy; Levenberg-Marquardt's kind, with bounds) from several starts. Coefficients of
small models are ill-conditioned, since alpha, b and c trade off: compare curves, not coefficients.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from relufy.errors import UserError
from relufy.schema import suggest

TOKENS = 1e9
"""The unit of D."""
LEAST_POINTS = 6
SMOOTHED = 5
"""Reports that are averaged into one, as the paper averages checkpoints."""


@dataclass(frozen=True)
class Falling:
    """`exp(-c D^alpha + b) + limit`."""

    alpha: float
    b: float
    c: float
    limit: float

    def at(self, tokens: Any) -> Any:
        """Return the activation ratio after so many 1e9 tokens."""
        return np.exp(-self.c * np.asarray(tokens, float) ** self.alpha + self.b) + self.limit


@dataclass(frozen=True)
class Rising:
    """`limit - c / D^alpha`."""

    alpha: float
    c: float
    limit: float

    def at(self, tokens: Any) -> Any:
        """Return the activation ratio after so many 1e9 tokens."""
        return self.limit - self.c / np.asarray(tokens, float) ** self.alpha


Law = Falling | Rising


@dataclass(frozen=True)
class LawFit:
    """A law, and how far it is from the points."""

    name: str
    law: Law
    error: float
    """Root of the mean squared difference from the points, in activation ratio."""
    points: int


LAWS = {"falling": Falling, "rising": Rising}
_STARTS: Mapping[str, Sequence[tuple[float, ...]]] = {
    "falling": [(a, b, c) for a, b, c in product((0.1, 0.5, 1.0, 1.5), (-3.0, 0.0), (0.01, 1.0))],
    "rising": [(a, c) for a, c in product((0.3, 1.0), (0.01, 0.3))],
}
"""Of all coefficients but the limit. With the scale of D at 1."""


def fit_law(tokens: Sequence[float], active: Sequence[float], name: str) -> LawFit:
    """Fit a law, `falling` or `rising`, to activation ratios after so many 1e9 tokens (Sparsing Law, 4).

    Needs scipy (`pip install relufy[eval]`). Raises UserError for too few points, and for points of no use.
    """
    from scipy.optimize import least_squares

    d, a = np.asarray(tokens, float), np.asarray(active, float)
    _check(d, a, name)
    scale = float(np.exp(np.log(d).mean()))
    low, high = _bounds(name)
    best: Any = None
    for start in _STARTS[name]:
        found = least_squares(
            lambda x: LAWS[name](*x).at(d / scale) - a,
            [*start, np.clip(a[-1], 1e-6, 1 - 1e-6)],
            bounds=(low, high),
            x_scale="jac",
            max_nfev=2000,
        )
        best = found if best is None or found.cost < best.cost else best
    law = _rescaled(LAWS[name](*(float(x) for x in best.x)), scale)
    return LawFit(name, law, float(np.sqrt(np.mean((law.at(d) - a) ** 2))), len(d))


def points_of(
    logs: Iterable[Mapping[str, Any]], site: str = "neuron", skip: float = 0.1, smoothed: int = SMOOTHED
) -> tuple[list[float], list[float]]:
    """Return tokens (1e9) and activation ratios, means over layers, from the reports of a training run.

    The first `skip` of the training (its warm-up) is left out, and so many reports are averaged into one.
    Raises UserError if the reports do not tell the sparsity of the site.
    """
    found = [
        (log["tokens"] / TOKENS, 1 - float(np.mean(log["sparsity"][site])))
        for log in logs
        if "tokens" in log and site in log.get("sparsity", {})
    ]
    if not found:
        raise UserError(f"the log has no report with tokens and the sparsity of {site}")
    kept = [pair for pair in found if pair[0] >= skip * found[-1][0]]
    groups = [kept[i : i + smoothed] for i in range(0, len(kept) - smoothed + 1, smoothed)]
    means = [np.mean(group, axis=0).tolist() for group in groups]
    return [mean[0] for mean in means], [mean[1] for mean in means]


def _check(tokens: np.ndarray, active: np.ndarray, name: str) -> None:
    if name not in LAWS:
        raise UserError(f"there is no law {name!r}{suggest(name, list(LAWS))}")
    if len(tokens) < LEAST_POINTS:
        raise UserError(
            f"a law needs {LEAST_POINTS} points or more, found {len(tokens)}; train longer, or average fewer "
            "reports into a point"
        )
    if len(tokens) != len(active) or not (np.isfinite(active).all() and (tokens > 0).all()):
        raise UserError("a law needs as many activation ratios as numbers of tokens, and these above 0")


def _bounds(name: str) -> tuple[list[float], list[float]]:
    """Return the least and greatest coefficients."""
    if name == "falling":
        return [1e-3, -50.0, 0.0, 0.0], [10.0, 50.0, np.inf, 1.0]
    return [1e-3, 0.0, 0.0], [10.0, np.inf, 1.0]


def _rescaled(law: Law, scale: float) -> Law:
    """Return the law of D from that of D / scale."""
    if isinstance(law, Falling):
        return Falling(law.alpha, law.b, law.c * scale**-law.alpha, law.limit)
    return Rising(law.alpha, law.c * scale**law.alpha, law.limit)
