"""Is the difference between two models more than noise? Tests on pairs: the same documents, both models.

Accuracies: the exact McNemar test, which counts the documents that only one of the two gets right. Other
means and log-likelihoods: the sign of each document's difference is drawn at random (exactly where there are
few). Everything else, such as BLEU or F1: the two models' results of a document change places at random.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from relufy.evaluation.scores import Scores
from relufy.measure.statistics import difference_of_pairs

Test = Literal["mcnemar", "sign-flip", "swap"]

RESAMPLES = 9999
SWAPS = 199
"""Fewer, since each computes a metric of all documents anew."""
SEED = 0
POWER_Z = 0.8416
"""The normal quantile of 0.8: what `could have been seen` would be, in four of five repetitions."""


@dataclass(frozen=True)
class PairedTest:
    """after - before in the metric's unit, its paired standard error, how likely noise gives as much."""

    difference: float
    standard_error: float
    p: float
    test: Test


def paired_test(before: Scores, after: Scores) -> PairedTest:
    """Test the difference of one metric on the same documents. Raises ValueError if they are not the same."""
    if before.documents != after.documents:
        raise ValueError(f"{before.name}: the two models did not see the same documents")
    if before.kind == "other":
        return _swapped(before, after)
    error = difference_of_pairs(after.influences(), before.influences()).standard_error
    differences = after.tested() - before.tested()
    if before.is_binary and after.is_binary:
        return PairedTest(after.value - before.value, error, mcnemar(differences), "mcnemar")
    return PairedTest(after.value - before.value, error, sign_flip(differences), "sign-flip")


def mcnemar(differences: np.ndarray) -> float:
    """Return the exact two-sided McNemar p of differences of 1, 0 and -1."""
    from scipy.stats import binomtest

    gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def sign_flip(differences: np.ndarray) -> float:
    """Return the two-sided p of a mean difference when each document's sign is as likely as its opposite."""
    from scipy.stats import permutation_test

    moved = differences[differences != 0]
    if len(moved) < 2:
        return 1.0  # one document is as far from zero with either sign
    found = permutation_test(
        (moved,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, 10_000_000 // len(moved)),
        rng=np.random.default_rng(SEED),
    )
    return float(found.pvalue)


def _swapped(before: Scores, after: Scores) -> PairedTest:
    """Test any aggregate: p from swaps within documents, the standard error from drawing documents anew."""
    generator = np.random.default_rng(SEED)
    observed, count = after.value - before.value, len(before.items)
    swaps, draws = [], []
    for _ in range(SWAPS):
        swap = generator.integers(2, size=count).astype(bool).tolist()
        pairs = [(b, a) if s else (a, b) for a, b, s in zip(after.items, before.items, swap, strict=True)]
        swaps.append(after.aggregate([a for a, _ in pairs]) - before.aggregate([b for _, b in pairs]))
        drawn = generator.integers(count, size=count).tolist()
        draws.append(_of(after, drawn) - _of(before, drawn))
    extreme = sum(abs(value) >= abs(observed) - 1e-12 for value in swaps)
    return PairedTest(observed, float(np.std(draws, ddof=1)), (1 + extreme) / (1 + SWAPS), "swap")


def _of(scores: Scores, drawn: Sequence[int]) -> float:
    return scores.aggregate([scores.items[index] for index in drawn])


def holm(p: Mapping[Any, float]) -> dict[Any, float]:
    """Return Holm's corrected p of each test: the chance of one false alarm among all stays below alpha."""
    corrected, least = {}, 0.0
    for rank, (name, value) in enumerate(sorted(p.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, (len(p) - rank) * value))
        corrected[name] = least
    return corrected


def could_have_seen(test: PairedTest, documents: int, alpha: float) -> float:
    """Return the difference that would be seen in four of five repetitions, in the metric's unit."""
    from scipy.stats import norm

    seen = (float(norm.isf(alpha / 2)) + POWER_Z) * test.standard_error
    if test.test != "mcnemar":
        return seen
    return max(seen, math.ceil(1 - math.log2(alpha)) / documents)  # so many must move, all one way
