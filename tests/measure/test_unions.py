"""Unions by hand, and the law that independent tokens follow."""

import numpy as np
import pytest
import torch

from relufy.measure.batches import Batch
from relufy.measure.unions import SAMPLED_WINDOWS, UnionCounts

WIDTH = 20
KEY = ("down", 0)


def batch_of(index: int, first: int, *lengths: int) -> Batch:
    return Batch(index, first, torch.zeros(len(lengths), max(lengths), dtype=torch.int64), lengths)


def see(counts: UnionCounts, batch: Batch, is_zero: torch.Tensor) -> None:
    counts.begin(batch)
    counts.add(*KEY, is_zero.flatten(0, 1), batch)
    counts.end()


def test_a_trace_by_hand() -> None:
    active = torch.zeros(1, 5, WIDTH, dtype=torch.bool)
    active[0, 0, 0] = active[0, 1, 1] = active[0, 2, 0] = active[0, 3, 0] = active[0, 4] = True
    counts = UnionCounts({KEY: WIDTH}, ["down"])
    see(counts, batch_of(0, 0, 5), ~active)
    found = counts.collect()
    assert found.runs == {2: 2, 4: 1} and found.groups == {}
    assert found.consecutive == {"down": {2: pytest.approx(((2 + 1) / (2 * WIDTH),)), 4: (2 / WIDTH,)}}


def test_padding_ends_a_run() -> None:
    counts = UnionCounts({KEY: WIDTH}, ["down"])
    see(counts, batch_of(0, 0, 8, 3), torch.zeros(2, 8, WIDTH, dtype=torch.bool))
    assert counts.collect().runs == {2: 5, 4: 2, 8: 1}
    assert counts.collect().consecutive["down"] == {2: (1.0,), 4: (1.0,), 8: (1.0,)}


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_independent_tokens_are_united_as_powers(sparsity: float) -> None:
    """Polar Sparsity's law: the share that no token of a batch needs is s ** batch."""
    generator = torch.Generator().manual_seed(0)
    counts = UnionCounts({KEY: 1000}, ["down"])
    for index in range(16):
        is_zero = torch.rand(16, 16, 1000, generator=generator) < sparsity
        see(counts, batch_of(index, 16 * index, *[16] * 16), is_zero)
    found = counts.collect()
    assert list(found.batches["down"]) == [2, 4, 8, 16, 32, 64]
    for densities in (found.consecutive["down"], found.batches["down"]):
        for tokens, (density,) in densities.items():
            assert density == pytest.approx(1 - sparsity**tokens, abs=0.01)


def test_groups_follow_from_the_windows_alone() -> None:
    """More windows than are kept, in batches of any size."""
    count, length = 3 * SAMPLED_WINDOWS, 9
    is_zero = torch.rand(count, length, WIDTH, generator=torch.Generator().manual_seed(1)) < 0.7
    found = []
    for size in (1, 50, 7):
        counts = UnionCounts({KEY: WIDTH}, ["down"])
        for index, start in enumerate(range(0, count, size)):
            part = is_zero[start : start + size]
            see(counts, batch_of(index, start, *[length] * len(part)), part)
        found.append(counts.collect())
    assert found[0] == found[1] == found[2]
    assert found[0].groups[64] == 16


def test_groups_are_of_different_windows() -> None:
    """Each window has its own neuron: a group of n windows unites n neurons, whichever tokens are drawn."""
    own = ~torch.eye(WIDTH, dtype=torch.bool)[:, None].expand(WIDTH, 6, WIDTH)
    counts = UnionCounts({KEY: WIDTH}, ["down"])
    see(counts, batch_of(0, 0, *[6] * WIDTH), own)
    assert counts.collect().batches["down"] == {n: (pytest.approx(n / WIDTH),) for n in (2, 4, 8, 16)}
    assert np.isclose(counts.collect().consecutive["down"][4][0], 1 / WIDTH)
