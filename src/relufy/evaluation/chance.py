"""What guessing scores on a multiple choice, and whether a score is more than that."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np

from relufy.measure.statistics import mean_and_error

LEVEL = 0.05


@dataclass(frozen=True)
class Chance:
    """The probability that a guess is right, by document, and the share that the best constant answer gets.

    `constant` is None where documents differ in their choices, so that there is no constant answer.
    """

    probabilities: tuple[float, ...]
    constant: float | None = None

    @property
    def level(self) -> float:
        """The share that guessing gets right: the mean of 1 / choices."""
        return mean_and_error(self.probabilities)[0]

    @cached_property
    def better_constant(self) -> float | None:
        """The constant answer's share where that is more than guessing gives: of few documents, some answer
        always is the commonest."""
        if self.constant is None:
            return None
        count, num_answers = len(self.probabilities), 1 / min(self.probabilities)
        by_guessing = probability_of_at_least(round(self.constant * count), self.probabilities)
        return self.constant if num_answers * by_guessing < LEVEL else None

    def is_beaten_by(self, correct: int) -> bool:
        """Return whether so many right answers are more than guesses and a constant answer give."""
        count = len(self.probabilities)
        guessing = probability_of_at_least(correct, self.probabilities)
        constant = probability_of_at_least(correct, [self.better_constant or 0.0] * count)
        return max(guessing, constant) < LEVEL


def chance_of(num_choices: Sequence[int], num_right: Sequence[int], answers: Sequence[object]) -> Chance:
    """Return the chance of documents by their choices and right ones; `answers` are the right ones' texts.

    An answer of None says that this document's choices are its own.
    """
    probabilities = tuple(right / choices for right, choices in zip(num_right, num_choices, strict=True))
    has_constant = all(answer is not None for answer in answers)
    most = Counter(answers).most_common(1)[0][1] if has_constant else 0
    return Chance(probabilities, most / len(answers) if has_constant else None)


def probability_of_at_least(correct: int, probabilities: Sequence[float]) -> float:
    """Return the exact probability that independent events happen at least so often (Poisson-binomial)."""
    from scipy.stats import binom

    parts = [binom.pmf(np.arange(n + 1), n, p) for p, n in sorted(Counter(probabilities).items())]
    return float(min(1.0, reduce(np.convolve, parts)[correct:].sum()))
