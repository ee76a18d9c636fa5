"""Counting what is true in masks, eight entries at a time: a bool is a byte, and a 64-bit number adds eight.

A processor sums bools about a hundred times slower by torch's own sum. Results are whole numbers, on the
mask's device, and nothing waits for it.
"""

from collections.abc import Iterator

import torch
from torch.nn import functional as F

LANES = 8
MOST = 255
"""How many bools a lane of eight bits can add up."""


def count_rows(mask: torch.Tensor) -> torch.Tensor:
    """Return how many entries of each row of a mask, bool `[rows, width]`, are true, int64 `[rows]`."""
    parts = [part.sum(1) for part in _words(mask).split(MOST, 1)]
    return torch.stack(parts, 1).view(torch.uint8).sum(1)


def count_columns(mask: torch.Tensor) -> torch.Tensor:
    """Return how many entries of each column of a mask, bool `[rows, width]`, are true, int64 `[width]`."""
    words = _words(mask)
    whole = len(words) // MOST * MOST
    sums = words[:whole].view(-1, MOST, words.shape[1]).sum(1)
    lanes = torch.cat([sums, words[whole:].sum(0, keepdim=True)]).view(torch.uint8)
    return lanes.sum(0)[: mask.shape[1]]


def in_whole_runs(mask: torch.Tensor, longest: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield, for runs of 2, 4, 8... up to `longest` neighbours, which entries are true in the whole run.

    The mask is bool `[windows, length, width]`; runs lie end to end from each window's beginning, and what is
    left at its end is no run: `[windows, length // run, width]`.
    """
    run = 1
    while run < longest and mask.shape[1] >= 2:
        even = mask.shape[1] // 2 * 2
        mask, run = mask[:, 0:even:2] & mask[:, 1:even:2], 2 * run
        yield run, mask


def _words(mask: torch.Tensor) -> torch.Tensor:
    """Return a mask's rows as 64-bit numbers of eight entries each, filled up with False."""
    missing = -mask.shape[1] % LANES
    return (F.pad(mask, (0, missing)) if missing else mask.contiguous()).view(torch.int64)
