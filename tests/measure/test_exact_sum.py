"""Sums that no order and no division changes."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relufy.measure.exact_sum import ExactSum, total


def sum_of(values) -> ExactSum:
    found = ExactSum()
    for value in values:
        found.add(value)
    return found


@pytest.mark.parametrize("order", list(itertools.permutations([1e16, 1.0, -1e16, 1e-9])))
def test_nothing_is_lost(order) -> None:
    assert float(sum_of(order)) == 1.000000001


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32)), st.integers(0, 9))
def test_parts_add_up(values: list[float], cut: int) -> None:
    assert float(total([sum_of(values[cut:]), sum_of(values[:cut])])) == float(sum_of(values))
