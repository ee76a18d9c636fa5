"""Sums of floating-point numbers that come out the same in any order and however they are divided."""

from collections.abc import Iterable
from fractions import Fraction


class ExactSum:
    """A sum without rounding; `float` rounds it once."""

    def __init__(self) -> None:
        self._total = Fraction(0)

    def add(self, value: float) -> None:
        """Add a finite number."""
        self._total += Fraction(value)

    def __float__(self) -> float:
        return float(self._total)


def total(sums: Iterable[ExactSum]) -> ExactSum:
    """Return the sum of sums."""
    whole = ExactSum()
    whole._total = sum((part._total for part in sums), Fraction(0))
    return whole
