"""Windows come in their order, padded on the right, and each goes to one process."""

import numpy as np
import pytest
import torch
from counted import ragged

from relufy.errors import UserError
from relufy.measure import batches as batches_file
from relufy.measure.batches import Batch, dealt_batches, windows_of

CPU = torch.device("cpu")


def no_tokenizer() -> None:
    raise AssertionError("windows of ids need no tokenizer")


def rows_of(batches: list[Batch]) -> list[list[int]]:
    return [row[:n].tolist() for batch in batches for row, n in zip(batch.ids, batch.lengths, strict=True)]


@pytest.mark.parametrize("size", [1, 3, 20])
def test_all_windows_are_there_and_padding_is_known(size: int) -> None:
    windows = ragged(7, 150)
    found = list(dealt_batches(iter(windows), size, 53))
    assert rows_of(found) == [window.tolist() for window in windows]
    assert [batch.first for batch in found] == list(range(0, 7, size))
    for batch in found:
        assert batch.tokens == batch.mask(CPU).sum() == sum(batch.lengths)
        assert batch.opening(CPU).sum(1).tolist() == [-(-length // 100) for length in batch.lengths]
        rows = torch.arange(batch.ids.numel())
        assert len(batch.tokens_of(rows)) == batch.tokens
        assert torch.equal(batch.by_window(rows)[0], rows[: batch.ids.shape[1]])


def test_batches_are_dealt_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    windows, dealt = ragged(11, 9), []
    monkeypatch.setattr(batches_file, "num_processes", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(batches_file, "process_index", lambda rank=rank: rank)
        dealt += list(dealt_batches(iter(windows), 2, 53))
    assert sorted(batch.index for batch in dealt) == list(range(6))
    assert rows_of(sorted(dealt, key=lambda batch: batch.index)) == [w.tolist() for w in windows]


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, list, iter])
def test_windows_of_ids_come_in_many_kinds(kind) -> None:
    rows = [[3, 4, 5], [6, 7, 8]]
    found = list(windows_of(kind(rows), no_tokenizer, 99))
    assert [window.tolist() for window in found] == rows
    assert all(window.dtype == np.int64 for window in found)


@pytest.mark.parametrize("text", [[[1.0, 2.0]], [[[1, 2]]], [3, 4]], ids=str)
def test_what_is_no_window_is_refused(text) -> None:
    with pytest.raises(UserError, match="expected files, or windows of token ids"):
        list(windows_of(text, no_tokenizer, 4))
