"""Texts of one domain are told from texts of two, by the frequencies of tokens."""

import numpy as np
import pytest

from relufy.measure.domain import compare_domains, divergence


def text(seed: int, favourite: int, windows: int = 80) -> np.ndarray:
    """Draw tokens by Zipf's law, where `favourite` decides which ones are frequent."""
    order = np.random.default_rng(favourite).permutation(400)
    shares = 1 / np.arange(1, 401)
    drawn = np.random.default_rng(seed).choice(order, (windows, 128), p=shares / shares.sum())
    return drawn.astype(np.int64)


def test_one_domain_and_two() -> None:
    same, other = (compare_domains(text(1, favourite), text(2, 0)) for favourite in (0, 1))
    assert same is not None and other is not None
    assert same.is_same and same.ratio == pytest.approx(1, abs=0.2)
    assert not other.is_same and other.ratio > 3


def test_too_little_text_tells_nothing() -> None:
    assert compare_domains(text(1, 0, windows=31), text(2, 0)) is None
    assert compare_domains(text(1, 0), text(2, 0, windows=63)) is None
    found = compare_domains(text(1, 0, windows=32), text(2, 0, windows=64))
    assert found is not None and found.tokens == 4096


def test_divergence_is_0_of_equals_1_of_strangers() -> None:
    first = np.array([1, 2, 2, 3])
    assert divergence(first, first[::-1]) == 0
    assert divergence(first, first + 10) == pytest.approx(1)
    assert divergence(first, first + 1) == pytest.approx(divergence(first + 1, first))


def test_a_text_without_any_variety() -> None:
    constant = np.full((80, 128), 7)
    same, other = (compare_domains(train, constant) for train in (constant, constant + 1))
    assert same is not None and other is not None
    assert same.is_same and not other.is_same
