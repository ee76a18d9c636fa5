"""Windows of token ids in batches, from files, arrays or any iterable, each batch dealt to one process.

Windows may differ in length; shorter ones are padded on the right of their batch, and the padding is told
apart everywhere. Nothing is kept, so a text may be of any length.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from relufy.errors import UserError
from relufy.processes import num_processes, process_index
from relufy.text import TextWindows, check_ids

OPENING_SHARE = 100
"""The first percent of a window is its first `length / OPENING_SHARE` tokens, rounded up."""

Text = str | Path | Sequence[str | Path] | np.ndarray | torch.Tensor | Mapping[str, Any] | Iterable[Any]
"""Files, or windows of ids: `[windows, length]`, an iterable of `[length]` each, or what a tokenizer returns
(`input_ids` with an `attention_mask`)."""


@dataclass(frozen=True)
class Batch:
    """Windows that run together: ids, int64 `[windows, longest]`, of `lengths` tokens each."""

    index: int
    """Of the batch in the text."""
    first: int
    """The number of its first window in the text."""
    ids: torch.Tensor
    lengths: tuple[int, ...]
    _moved: dict[tuple[str, torch.device], torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> int:
        """How many tokens there are, without padding."""
        return sum(self.lengths)

    @property
    def is_padded(self) -> bool:
        return self.tokens < self.ids.numel()

    def mask(self, device: torch.device) -> torch.Tensor:
        """Return what is a token and not padding, bool `[windows, longest]`."""
        return self._on("mask", self.lengths, device)

    def opening(self, device: torch.device) -> torch.Tensor:
        """Return what belongs to the first percent of its window, bool `[windows, longest]`."""
        return self._on("opening", [-(-length // OPENING_SHARE) for length in self.lengths], device)

    def by_window(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows `[windows * longest, ...]` as `[windows, longest, ...]`."""
        return rows.reshape(*self.ids.shape, *rows.shape[1:])

    def tokens_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Return those of rows `[windows * longest, ...]` that are tokens; waits for them if some are not."""
        return rows[self.mask(rows.device).flatten()] if self.is_padded else rows

    def _on(self, name: str, ends: Sequence[int], device: torch.device) -> torch.Tensor:
        """Return which positions lie before each window's end."""
        if (name, device) not in self._moved:
            is_before = torch.arange(self.ids.shape[1]) < torch.tensor(ends)[:, None]
            self._moved[name, device] = is_before.to(device)
        return self._moved[name, device]


def windows_of(text: Text, tokenizer: Callable[[], Any], length: int) -> Iterable[np.ndarray]:
    """Return windows of ids, each int64 `[length]`; files are cut by the tokenizer made then, as TextWindows.

    Raises UserError, here or while they are read, for what is neither files nor windows.
    """
    if isinstance(text, str | Path):
        text = [text]
    if isinstance(text, Mapping):
        return _without_padding(text)
    if isinstance(text, Sequence) and text and all(isinstance(part, str | Path) for part in text):
        return TextWindows(text, tokenizer(), length)
    return (_ids(window) for window in text)


def dealt_batches(
    windows: Iterable[np.ndarray], size: int, vocab_size: int, most: int | None = None
) -> Iterator[Batch]:
    """Yield this process's batches of at most `most` windows: all if it is alone, else one in turn.

    Raises UserError for windows that are too short or not of this vocabulary, and if there is none.
    """
    waiting = iter(islice(windows, most))
    first = index = 0
    while part := list(islice(waiting, size)):
        if index % num_processes() == process_index():
            yield _batch(index, first, part, vocab_size)
        first, index = first + len(part), index + 1
    if not first:
        raise UserError("there is no window to measure; give more text")


def _batch(index: int, first: int, windows: Sequence[np.ndarray], vocab_size: int) -> Batch:
    lengths = tuple(len(window) for window in windows)
    ids = np.zeros((len(windows), max(lengths)), dtype=np.int64)
    for row, window in zip(ids, windows, strict=True):
        row[: len(window)] = window
    if min(lengths) < 2:
        raise UserError(f"window {first + lengths.index(min(lengths))} has fewer than 2 tokens")
    check_ids(int(ids.min()), int(ids.max()), vocab_size)
    return Batch(index, first, torch.from_numpy(ids), lengths)


def _without_padding(text: Mapping[str, Any]) -> Iterator[np.ndarray]:
    ids, masks = (np.asarray(text[key]) for key in ("input_ids", "attention_mask"))
    return (_ids(row[mask != 0]) for row, mask in zip(ids, masks, strict=True))


def _ids(window: Any) -> np.ndarray:
    ids = np.asarray(window)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(
            f"expected files, or windows of token ids, whole numbers [length], found {ids.dtype} "
            f"{list(ids.shape)}"
        )
    return ids.astype(np.int64)
