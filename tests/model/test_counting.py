"""Counts of eight entries at a time are those of one at a time, at any size."""

import pytest
import torch

from relufy.model.counting import count_columns, count_rows, in_whole_runs


def mask_of(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) < 0.7


@pytest.mark.parametrize("rows", [0, 1, 255, 256, 600])
@pytest.mark.parametrize("width", [1, 8, 13, 2040, 2100])
def test_rows_and_columns(rows: int, width: int) -> None:
    mask = mask_of(rows, width)
    assert torch.equal(count_rows(mask), mask.sum(1))
    assert torch.equal(count_columns(mask), mask.sum(0))
    assert torch.equal(count_columns(torch.ones_like(mask)), torch.full((width,), rows))


def test_slices() -> None:
    mask = mask_of(20, 24)
    for part in (mask[3:], mask[:, 3:], mask[::2], mask.T):
        assert torch.equal(count_rows(part), part.sum(1))
        assert torch.equal(count_columns(part), part.sum(0))


@pytest.mark.parametrize("length", [1, 2, 7, 16, 19])
def test_runs(length: int) -> None:
    mask = mask_of(3, length, 5)
    found = dict(in_whole_runs(mask, 8))
    assert list(found) == [run for run in (2, 4, 8) if run <= length]
    for run, in_all in found.items():
        count = length // run
        assert torch.equal(in_all, mask[:, : count * run].unflatten(1, (count, run)).all(2))
