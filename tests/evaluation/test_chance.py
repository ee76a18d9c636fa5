"""Chance: what guessing gets, and when a score is more than that."""

import itertools
import math

import pytest

pytest.importorskip("scipy")

from relufy.evaluation.chance import Chance, chance_of, probability_of_at_least


def by_cases(correct: int, probabilities: list[float]) -> float:
    return sum(
        math.prod(p if right else 1 - p for p, right in zip(probabilities, case, strict=True))
        for case in itertools.product((0, 1), repeat=len(probabilities))
        if sum(case) >= correct
    )


@pytest.mark.parametrize("correct", [0, 1, 3, 6])
def test_documents_may_have_different_numbers_of_choices(correct: int) -> None:
    probabilities = [1 / 2, 1 / 4, 1 / 4, 1 / 3, 1 / 5, 1 / 2]
    assert probability_of_at_least(correct, probabilities) == pytest.approx(by_cases(correct, probabilities))


def test_the_level_is_the_mean_of_one_over_the_choices() -> None:
    chance = chance_of([2, 4, 4], [1, 1, 2], [None] * 3)
    assert chance.level == pytest.approx((1 / 2 + 1 / 4 + 2 / 4) / 3) and chance.constant is None


def test_one_constant_answer_can_be_better_than_guessing() -> None:
    chance = chance_of([2] * 100, [1] * 100, ["no"] * 70 + ["yes"] * 30)
    assert (chance.level, chance.constant, chance.better_constant) == (0.5, 0.7, 0.7)
    assert not chance.is_beaten_by(71) and not chance.is_beaten_by(77) and chance.is_beaten_by(80)


def test_of_few_documents_some_answer_always_is_the_commonest() -> None:
    chance = chance_of([4] * 20, [1] * 20, ["a"] * 8 + ["b"] * 4 + ["c"] * 4 + ["d"] * 4)
    assert chance.constant == 0.4 and chance.better_constant is None
    assert chance.is_beaten_by(9) and not chance.is_beaten_by(8)


def test_more_than_guessing_takes_more_than_noise() -> None:
    chance = Chance((0.5,) * 100)
    assert not chance.is_beaten_by(58) and chance.is_beaten_by(59)
    assert not chance.is_beaten_by(20)
