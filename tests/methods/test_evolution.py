"""The evolution: never worse than its start, inside 0 and 1, repeatable, and near a planted optimum."""

import math
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relufy.methods.evolution import evolve

PLACES = [(layer, site) for layer in range(3) for site in "qkvo"]
WANTED = {place: 0.5 + 0.04 * index for index, place in enumerate(PLACES)}


def distance(splits: Mapping[tuple[int, str], float]) -> float:
    return sum((splits[place] - WANTED[place]) ** 2 for place in WANTED)


def evolved(start: Mapping, loss: Callable, population: int, generations: int, seed: int) -> tuple:
    return evolve([(loss(start), start)], loss, population, generations, seed, silent)


def silent(_done: int, _total: int) -> None:
    """Show nothing."""


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=9),
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(0, 2**32 - 1),
)
def test_never_worse_than_the_start_and_inside_0_and_1(
    values: list[float], population: int, generations: int, seed: int
) -> None:
    seen, start = [], dict(enumerate(values))

    def loss(splits: Mapping[int, float]) -> float:
        seen.append(dict(splits))
        return sum(math.sin(40 * value + place) for place, value in splits.items())

    found, least = evolved(start, loss, population, generations, seed)
    assert least == loss(found) <= loss(start)
    assert all(0 <= value <= 1 for splits in seen for value in splits.values())
    assert all(splits.keys() == start.keys() for splits in seen)
    assert seen[0] == start == dict(enumerate(values))
    assert least == min(map(loss, list(seen)))


def test_the_same_seed_finds_the_same() -> None:
    start = dict.fromkeys(PLACES, 1.0)
    runs = [evolved(start, distance, 8, 6, seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_a_planted_optimum_is_found_roughly() -> None:
    start = dict.fromkeys(PLACES, 1.0)
    found, least = evolved(start, distance, 16, 60, 0)
    assert least < distance(start) / 50
    assert max(abs(found[place] - WANTED[place]) for place in PLACES) < 0.15


def test_an_optimum_at_the_edge_stays_inside() -> None:
    found, least = evolved(dict.fromkeys("abc", 0.3), lambda s: sum(s.values()), 8, 30, 0)
    assert 0 <= least < 0.2
    assert min(found.values()) >= 0


@pytest.mark.parametrize("seed", range(5))
def test_a_loss_that_is_no_number_never_wins(seed: int) -> None:
    def loss(splits: Mapping[str, float]) -> float:
        return math.nan if splits["a"] < 0.85 else splits["a"]

    found, least = evolved({"a": 1.0, "b": 1.0}, loss, 8, 8, seed)
    assert 0.85 <= found["a"] == least < 1


def test_the_best_of_several_starts_goes_on() -> None:
    starts = [(splits["a"], splits) for splits in ({"a": 1.0}, {"a": 0.4}, {"a": 0.7})]
    found, least = evolve(starts, lambda s: s["a"], 1, 1, 0, silent)
    assert found["a"] == least <= 0.4


def test_progress_ends_at_its_total() -> None:
    shown, calls = [], []

    def loss(splits: Mapping[str, float]) -> float:
        calls.append(1)
        return splits["a"]

    evolve([(1.0, {"a": 1.0})], loss, 3, 4, 0, lambda done, total: shown.append((done, total)))
    assert shown == [(done, 12) for done in range(1, 13)]
    assert len(calls) == 12
