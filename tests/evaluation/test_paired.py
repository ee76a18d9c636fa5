"""Paired tests against their definitions, counted out by hand."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("scipy")

from relufy.evaluation.paired import could_have_seen, holm, mcnemar, paired_test, sign_flip
from relufy.evaluation.scores import Scores, bits_per_unit, perplexity_per_unit
from relufy.measure.statistics import mean_and_error


def mean(items: Any) -> float:
    return float(np.mean(items))


def scores(items: Any, kind: str = "mean", aggregate: Any = mean, **fields: Any) -> Scores:
    items = tuple(items)
    documents = tuple(str(index) for index in range(len(items)))
    return Scores("task", "acc", kind, items, documents, aggregate, **fields)  # type: ignore[arg-type]


def by_flips(differences: list[float]) -> float:
    """Return the share of all sign assignments whose sum is at least as far from zero."""
    total = abs(sum(differences))
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return mean([value >= total - 1e-9 for value in sums])


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (3, 3), (1, 8), (10, 2)])
def test_mcnemar_counts_the_documents_that_one_model_alone_gets_right(gained: int, lost: int) -> None:
    n = gained + lost
    at_most = sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n
    differences = np.array([1] * gained + [-1] * lost + [0] * 50)
    assert mcnemar(differences) == pytest.approx(min(1.0, 2 * at_most))


@given(st.lists(st.floats(-2, 2).map(lambda x: round(x, 2)), min_size=1, max_size=8))
def test_sign_flips_are_exact_for_few_documents(differences: list[float]) -> None:
    assert sign_flip(np.array(differences)) == pytest.approx(by_flips(differences), abs=1e-9)


def test_sign_flips_of_many_documents_are_near_the_t_test() -> None:
    from scipy.stats import ttest_1samp

    differences = np.random.default_rng(3).normal(0.15, 1.0, 200)
    assert sign_flip(differences) == pytest.approx(ttest_1samp(differences, 0).pvalue, abs=0.01)


def test_noise_is_called_a_difference_as_rarely_as_it_says() -> None:
    generator = np.random.default_rng(0)
    found = [sign_flip(generator.normal(size=9)) for _ in range(300)]
    assert np.mean([p < 0.05 for p in found]) == pytest.approx(0.05, abs=0.03)


def test_accuracies_have_the_paired_error_and_mcnemars_p() -> None:
    before, after = [1, 1, 0, 1, 0, 1, 1, 0], [1, 0, 0, 1, 0, 0, 0, 1]
    found = paired_test(scores(before), scores(after))
    differences = [b - a for a, b in zip(before, after, strict=True)]
    assert found.difference == pytest.approx(-2 / 8)
    assert found.standard_error == pytest.approx(mean_and_error(differences)[1])
    assert found.p == mcnemar(np.array(differences)) and found.test == "mcnemar"


def test_a_model_does_not_differ_from_itself() -> None:
    pairs = [(-3.0, 2), (-9.0, 7), (-4.0, 2)]
    for items in ([1, 0, 1], [0.2, 0.7, 0.1]):
        found = paired_test(scores(items), scores(items))
        assert found.difference == found.standard_error == 0.0 and found.p == 1.0
    ratio = scores(pairs, "weighted_perplexity", perplexity_per_unit)
    assert paired_test(ratio, ratio).p == 1.0 and paired_test(ratio, ratio).standard_error == 0.0


@pytest.mark.parametrize(
    ("kind", "aggregate"),
    [("weighted_perplexity", perplexity_per_unit), ("bits_per_unit", bits_per_unit)],
)
def test_the_error_of_a_ratio_is_near_the_jackknifes(kind: str, aggregate: Any) -> None:
    generator = np.random.default_rng(1)
    units = generator.integers(20, 60, 80)
    items = [(-2.0 * u + generator.normal(0, 4), int(u)) for u in units]
    found = scores(items, kind, aggregate)
    left_out = [aggregate(items[:i] + items[i + 1 :]) for i in range(80)]
    jackknife = math.sqrt(79 * np.var(left_out))
    assert found.standard_error == pytest.approx(jackknife, rel=0.05)
    assert mean(found.influences()) == pytest.approx(found.value)
    assert found.value == pytest.approx(aggregate(items))


def test_perplexities_are_compared_by_their_log_likelihoods() -> None:
    before = scores([-1.0, -2.0, -3.0, -1.5], "perplexity", lambda items: math.exp(-mean(items)))
    after = scores([-1.1, -2.3, -3.1, -1.9], "perplexity", lambda items: math.exp(-mean(items)))
    found = paired_test(before, after)
    assert found.test == "sign-flip" and found.p == by_flips([-0.1, -0.3, -0.1, -0.4])
    assert found.difference == pytest.approx(after.value - before.value) and found.difference > 0


def test_any_other_aggregate_is_tested_by_swaps() -> None:
    generator = np.random.default_rng(2)
    before = [(float(x),) for x in generator.normal(0.0, 1, 60)]
    better = [(x + 0.5,) for (x,) in before]
    noise = [(x + float(e),) for (x,), e in zip(before, generator.normal(0, 0.5, 60), strict=True)]

    def median(items: Any) -> float:
        return float(np.median([x for (x,) in items]))

    first = scores(before, "other", median)
    changed = paired_test(first, scores(better, "other", median))
    assert changed.test == "swap" and changed.p <= 0.01 and changed.difference == pytest.approx(0.5)
    assert paired_test(first, scores(noise, "other", median)).p > 0.05
    assert 0 < first.standard_error < 1


def test_other_documents_are_not_paired() -> None:
    other = Scores("task", "acc", "mean", (1, 0), ("a", "b"), mean)
    with pytest.raises(ValueError, match="did not see the same documents"):
        paired_test(scores([1, 0]), other)


def test_holm_is_the_stepwise_correction() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_what_could_have_been_seen_would_be_seen() -> None:
    before = scores([1] * 50 + [0] * 50)
    assert could_have_seen(paired_test(before, before), 100, 0.05) == 0.06
    moved = np.array([1] * 6 + [0] * 94)
    assert mcnemar(moved) < 0.05 < mcnemar(np.array([1] * 5 + [0] * 95))
    after = scores([1] * 40 + [0] * 50 + [1] * 10)
    found = paired_test(before, after)
    assert could_have_seen(found, 100, 0.05) == pytest.approx(2.8016 * found.standard_error, rel=1e-4)
