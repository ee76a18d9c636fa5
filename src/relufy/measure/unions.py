"""Union density: the share of entries that are active at any of several tokens.

It is what a step over several tokens reads: a prompt's or a draft's consecutive ones, or one of each sequence
in a batch. Consecutive runs lie end to end from each window's beginning. Groups for batches are of random
tokens of different windows; which ones follows from the windows' numbers alone, so the result depends neither
on how windows were batched nor on which process ran them.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from relufy.measure.batches import Batch
from relufy.measure.zero_counts import Key
from relufy.model.counting import count_rows, in_whole_runs
from relufy.processes import from_all, sums_over_processes

LONGEST_RUN = 512
LARGEST_GROUP = 64
SAMPLED_WINDOWS, TOKENS_OF_EACH = 128, 8
"""How many windows groups are made of, and from how many places in each."""

Densities = Mapping[str, Mapping[int, tuple[float, ...]]]
"""Site -> number of tokens -> one density per layer."""


@dataclass(frozen=True)
class Unions:
    """Union densities over consecutive tokens and over groups as in a batch, and of how many of them."""

    consecutive: Densities
    runs: Mapping[int, int]
    """Number of tokens -> how many runs were united."""
    batches: Densities
    groups: Mapping[int, int]


class UnionCounts:
    """Add what is zero at each site; what is united are complements, zeros of all tokens of a run."""

    def __init__(self, widths: Mapping[Key, int], sites: Collection[str]) -> None:
        self._widths = {key: width for key, width in widths.items() if key[0] in sites}
        self._sites = list(dict.fromkeys(site for site, _ in self._widths))
        levels = LONGEST_RUN.bit_length() - 1
        self._silent = {key: torch.zeros(levels, dtype=torch.int64) for key in self._widths}
        """Key -> entries that were zero in whole runs of 2, 4, 8... tokens."""
        self._runs = torch.zeros(levels, dtype=torch.int64)
        self._sample = _Sample(self._widths)
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def begin(self, batch: Batch) -> None:
        """Begin the pass of a batch."""
        for level in range(len(self._runs)):
            self._runs[level] += sum(length >> (level + 1) for length in batch.lengths)
        self._sample.begin(batch)

    def add(self, site: str, layer: int, is_zero: torch.Tensor, batch: Batch) -> None:
        """Add what is zero at a site, bool `[rows, width]`."""
        key = site, layer
        if key not in self._widths:
            return
        if self._last is None or self._last[0] is not is_zero:
            self._last = is_zero, _silent_in_runs(is_zero, batch, len(self._runs))
        self._silent[key] = self._silent[key].to(is_zero.device) + self._last[1]
        self._sample.add(key, is_zero)

    def end(self) -> None:
        """End the pass."""
        self._last = None

    def collect(self) -> Unions:
        """Return what all processes counted; all of them must call this."""
        *sums, runs = sums_over_processes([*self._silent.values(), self._runs])
        silent = dict(zip(self._silent, sums, strict=True))
        lengths = {2 << level: count for level, count in enumerate(runs.tolist()) if count}
        consecutive = {
            site: {
                run: tuple(
                    _density(int(silent[key][level]), count * self._widths[key]) for key in self._keys(site)
                )
                for level, (run, count) in enumerate(lengths.items())
            }
            for site in self._sites
        }
        batches, groups = self._sample.collect()
        by_site = {
            site: {size: tuple(batches[key][size] for key in self._keys(site)) for size in groups}
            for site in self._sites
        }
        return Unions(consecutive, lengths, by_site, groups)

    def _keys(self, site: str) -> list[Key]:
        return [key for key in self._widths if key[0] == site]


class _Sample:
    """The zeros of a few tokens of the windows whose numbers have the least hashes, a bit for each entry."""

    def __init__(self, widths: Mapping[Key, int]) -> None:
        self._widths = widths
        self._slots: dict[int, tuple[int, int]] = {}
        """Window -> its hash, and its place in `_bits`."""
        self._bits: dict[Key, torch.Tensor] = {}
        self._rows, self._places = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)

    def begin(self, batch: Batch) -> None:
        """Choose which windows of a batch are kept, in whose places, and their tokens."""
        taken = {}
        for row, length in enumerate(batch.lengths):
            if (place := self._place(batch.first + row)) is not None:
                taken[place] = [row * batch.ids.shape[1] + at for at in _positions(batch.first + row, length)]
        self._places = torch.tensor(list(taken), dtype=torch.int64)
        self._rows = torch.tensor(list(taken.values()), dtype=torch.int64).flatten()

    def add(self, key: Key, is_zero: torch.Tensor) -> None:
        if len(self._places):
            width = -(-self._widths[key] // 8)
            bits = _packed(is_zero.index_select(0, self._rows.to(is_zero.device)))
            if key not in self._bits:
                shape = SAMPLED_WINDOWS, TOKENS_OF_EACH, width
                self._bits[key] = torch.zeros(shape, dtype=torch.uint8, device=is_zero.device)
            self._bits[key][self._places.to(is_zero.device)] = bits.view(-1, TOKENS_OF_EACH, width)

    def collect(self) -> tuple[dict[Key, dict[int, float]], dict[int, int]]:
        """Return by key the density of each size of group, and of how many groups."""
        own = [(number, slot) for _, number, slot in sorted((h, n, s) for n, (h, s) in self._slots.items())]
        everyone = from_all([number for number, _ in own])
        chosen = sorted((n for numbers in everyone for n in numbers), key=_hash)[:SAMPLED_WINDOWS]
        sizes = [2 << level for level in range(LARGEST_GROUP.bit_length() - 1) if 2 << level <= len(chosen)]
        found = {}
        for key, width in self._widths.items():
            bits = self._gathered(key, own, chosen)
            found[key] = dict(zip(sizes, _densities(bits, width, len(sizes)), strict=True))
        return found, {size: len(chosen) // size * TOKENS_OF_EACH for size in sizes}

    def _gathered(self, key: Key, own: list[tuple[int, int]], chosen: list[int]) -> np.ndarray:
        """Return the bits of the chosen windows, in that order, from whichever process has them."""
        wanted = set(chosen)
        mine = [(number, slot) for number, slot in own if number in wanted]
        bits = self._bits[key].cpu().numpy() if mine else np.zeros((0, 0, 0), dtype=np.uint8)
        parts = from_all({number: bits[slot] for number, slot in mine})
        merged = {number: rows for part in parts for number, rows in part.items()}
        return np.stack([merged[number] for number in chosen])

    def _place(self, number: int) -> int | None:
        """Return the place of a window, which another one may have lost; None if it is not kept."""
        if len(self._slots) < SAMPLED_WINDOWS:
            place = len(self._slots)
        else:
            last = max(self._slots, key=lambda window: self._slots[window][0])
            if _hash(number) > self._slots[last][0]:
                return None
            place = self._slots.pop(last)[1]
        self._slots[number] = _hash(number), place
        return place


def _silent_in_runs(is_zero: torch.Tensor, batch: Batch, levels: int) -> torch.Tensor:
    """Return how many entries are zero in whole runs of 2, 4, 8... tokens, int64 `[levels]`."""
    found = is_zero.new_zeros(levels, dtype=torch.int64)
    for level, (run, silent) in enumerate(in_whole_runs(batch.by_window(is_zero), 1 << levels)):
        counts = count_rows(silent.flatten(0, 1)).view(silent.shape[:2])
        if batch.is_padded:
            counts = counts * batch.mask(is_zero.device)[:, run - 1 :: run]
        found[level] = counts.sum()
    return found


def _densities(bits: np.ndarray, width: int, levels: int) -> list[float]:
    """Return the union densities of 2, 4, 8... windows at each place, of zeros `[windows, places, bytes]`."""
    found = []
    for _ in range(levels):
        even = len(bits) // 2 * 2
        bits = bits[0:even:2] & bits[1:even:2]
        entries = bits.shape[0] * bits.shape[1] * width
        found.append(_density(int(np.bitwise_count(bits).sum()), entries))
    return found


def _density(zeros: int, entries: int) -> float:
    return (entries - zeros) / entries


def _packed(is_zero: torch.Tensor) -> torch.Tensor:
    """Return eight entries in each byte, uint8 `[rows, width / 8]`; what fills up the last one is 0."""
    bits = torch.nn.functional.pad(is_zero.to(torch.uint8), (0, -is_zero.shape[1] % 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.unflatten(1, (-1, 8)) << shifts).sum(-1, dtype=torch.uint8)


def _positions(number: int, length: int) -> list[int]:
    """Return which tokens of a window are sampled."""
    return [_mixed(_hash(number) + place) % length for place in range(TOKENS_OF_EACH)]


def _hash(number: int) -> int:
    return _mixed(number * 0x9E3779B97F4A7C15 + 1)


def _mixed(x: int) -> int:
    """Return a number in which every bit depends on every bit of x (SplitMix64's finalizer)."""
    x &= (1 << 64) - 1
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & ((1 << 64) - 1)
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & ((1 << 64) - 1)
    return x ^ (x >> 31)
