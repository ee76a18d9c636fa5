"""Exact zeros by site, layer and token: how many tokens have how many of them, in whole numbers.

A histogram over tokens holds one count for each number of zeros that a token can have, so that means and
percentiles are exact, and counts of parts of a text add up to those of all of it. Everything stays on the
device of its layer until it is asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from relufy.measure.batches import Batch
from relufy.measure.site_weights import branch_weights, site_weights, weights_by_list
from relufy.model.structure import BlockSites, find_blocks
from relufy.processes import sums_over_processes

BINS = 1 << 16
"""The weights that a token leaves unread are counted in so many steps, each with their sum."""
SITES = ("q", "k", "v", "o", "gate", "neuron", "up", "down")
LOW, HIGH = 5, 95
"""Percent of the tokens."""

Key = tuple[str, int]
"""A site and a layer."""


@dataclass(frozen=True)
class SiteZeros:
    """The share of exact zeros at a site, one value per layer: over all tokens, and where windows begin."""

    mean: tuple[float, ...]
    p5: tuple[float, ...]
    """Over tokens: 5 % of them have at most this share of zeros."""
    p95: tuple[float, ...]
    first_token: tuple[float, ...]
    first_percent: tuple[float, ...]
    """The first percent of each window, rounded up, the first token included."""
    rest: tuple[float, ...]


@dataclass(frozen=True)
class Unread:
    """The share of the blocks' linear weights that a token does not read."""

    mean: float
    p5: float
    p95: float


class ZeroCounts:
    """Add each pass's zeros, site by site; a pass begins with q of the first layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        blocks = find_blocks(model)
        self.num_layers = len(blocks)
        self.widths = {(site, b.index): width for b in blocks for site, width in widths(b).items()}
        self.sites = list(dict.fromkeys(site for site, _ in self.widths))
        self._weights = {
            (site, block.index): weights // widths(block)[site]
            for block in blocks
            for site, weights in weights_by_list(model, block).items()
        }
        self._total = sum(sum(site_weights(block).values()) for block in blocks)
        self._branches = sum(branch_weights(block) for block in blocks)
        self._tokens = {key: torch.zeros(width + 1, dtype=torch.int64) for key, width in self.widths.items()}
        """Key -> how many tokens have so many zeros, `[width + 1]`."""
        self._opening = {key: torch.zeros(2, dtype=torch.int64) for key in self.widths}
        """Key -> zeros in first tokens, and in the first percent."""
        self._openings = torch.zeros(2, dtype=torch.int64)
        """How many tokens those are."""
        self._unread = torch.zeros(2, BINS + 1, dtype=torch.int64)
        """How many tokens leave about so many weights unread, and how many these are together."""
        self._running: tuple[torch.Tensor, Batch | None] | None = None

    def add(self, site: str, layer: int, zeros: torch.Tensor, batch: Batch | None = None) -> None:
        """Add the zeros of each token of the running pass, int64 `[tokens]`; of a batch, with its padding."""
        if site == "q" and layer == 0:
            self.end()
            self._running = torch.zeros_like(zeros), batch
            self._openings += _num_openings(batch)
        key = site, layer
        self._tokens[key] = counts = self._tokens[key].to(zeros.device)
        counts.scatter_add_(0, zeros, _counted(zeros, batch))
        if batch is not None:
            self._opening[key] = self._opening[key].to(zeros.device) + _opening_zeros(zeros, batch)
        if self._running is not None and (weights := self._weights.get(key, 0)):
            self._running[0].add_(zeros.to(self._running[0].device), alpha=weights)

    def end(self) -> None:
        """End the running pass: count the weights that its tokens left unread."""
        if self._running is None:
            return
        unread, batch = self._running
        self._unread = self._unread.to(unread.device)
        counted = _counted(unread, batch)
        places = unread * BINS // self._total
        self._unread[0].scatter_add_(0, places, counted)
        self._unread[1].scatter_add_(0, places, unread * counted)
        self._running = None

    def collect(self) -> "CollectedZeros":
        """Return what all processes counted; all of them must call this."""
        self.end()
        keys = list(self.widths)
        everything = [
            *(self._tokens[key] for key in keys),
            *(self._opening[key] for key in keys),
            self._openings,
            self._unread,
        ]
        *sums, openings, unread = sums_over_processes(everything)
        tokens, opening = dict(zip(keys, sums, strict=False)), dict(zip(keys, sums[len(keys) :], strict=True))
        return CollectedZeros(self, tokens, opening, openings, unread)

    def unread_share(self, weights: float) -> float:
        """Return the share that weights left unread are of all; low-rank branches count as read."""
        return (weights - self._branches) / self._total


@dataclass(frozen=True)
class CollectedZeros:
    """What ZeroCounts counted, in all processes."""

    counts: ZeroCounts
    by_token: dict[Key, torch.Tensor]
    opening: dict[Key, torch.Tensor]
    openings: torch.Tensor
    unread_counts: torch.Tensor

    @property
    def tokens(self) -> int:
        return int(self.by_token["q", 0].sum())

    def zeros(self, key: Key) -> int:
        """Return the number of zeros at a site of a layer."""
        return int((self.by_token[key] * torch.arange(self.counts.widths[key] + 1)).sum())

    def percentile(self, key: Key, percent: int) -> int:
        """Return the least number of zeros that at least so many percent of the tokens have at most."""
        return percentile(self.by_token[key], percent)

    def means(self, site: str) -> tuple[float, ...]:
        """Return the share of zeros at a site, by layer."""
        return tuple(self.zeros(key) / (self.tokens * self.counts.widths[key]) for key in self._keys(site))

    def site(self, site: str) -> SiteZeros:
        """Return a site's shares."""
        rows = [self._layer(key) for key in self._keys(site)]
        return SiteZeros(*(tuple(column) for column in zip(*rows, strict=True)))

    def unread(self) -> Unread:
        """Return the share of the blocks' weights that is not read."""
        counts, sums = self.unread_counts
        low, high = (percentile(counts, percent) for percent in (LOW, HIGH))
        shares = (float(sums[place]) / float(counts[place]) for place in (low, high))
        mean = float(sums.sum()) / self.tokens
        return Unread(self.counts.unread_share(mean), *(self.counts.unread_share(s) for s in shares))

    def _keys(self, site: str) -> list[Key]:
        return [(site, layer) for layer in range(self.counts.num_layers)]

    def _layer(self, key: Key) -> list[float]:
        width, zeros = self.counts.widths[key], self.zeros(key)
        first, opening = self.opening[key].tolist()
        num_first, num_opening = self.openings.tolist()
        parts = [(zeros, self.tokens), (first, num_first), (opening, num_opening)]
        parts.append((zeros - opening, self.tokens - num_opening))
        mean, *others = (count / (tokens * width) if tokens else float("nan") for count, tokens in parts)
        return [mean, *(self.percentile(key, percent) / width for percent in (LOW, HIGH)), *others]


def percentile(counts: torch.Tensor, percent: int) -> int:
    """Return the least place up to which at least so many percent of all counts, int64 `[places]`, lie."""
    below = counts.cumsum(0)
    return int(torch.searchsorted(below, -(-int(below[-1]) * percent // 100)))


def widths(block: BlockSites) -> dict[str, int]:
    """Return how many entries there are at each site of a block."""
    found = {site: projection.shape[1] for site, projection in block.projections().items()}
    found["neuron"] = found["down"]
    return {site: found[site] for site in SITES if site in found}


def _counted(rows: torch.Tensor, batch: Batch | None) -> torch.Tensor:
    """Return 1 for each row that is a token, and 0 for padding, int64 `[rows]`."""
    if batch is None or not batch.is_padded:
        return torch.ones_like(rows)
    return batch.mask(rows.device).flatten().long()


def _num_openings(batch: Batch | None) -> torch.Tensor:
    if batch is None:
        return torch.zeros(2, dtype=torch.int64)
    return torch.stack([torch.tensor(len(batch.lengths)), batch.opening(torch.device("cpu")).sum()])


def _opening_zeros(zeros: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the zeros in the first tokens, and in the first percent, int64 `[2]`."""
    by_window = batch.by_window(zeros)
    return torch.stack([by_window[:, 0].sum(), (by_window * batch.opening(zeros.device)).sum()])


def mean_of(values: Sequence[float]) -> float:
    """Return the mean over layers, which all have the same width."""
    return sum(values) / len(values)
