"""Windows of tokens for ever, in an order that follows from (text, window, seed) alone.

    sources:   stored   [ids of all windows, in memory]      complete epochs, each another shuffle
               streamed [pieces -> ids -> windows -> buffer]  epochs too, but shuffled within a buffer only
    mixture:   window i comes from the source that a number drawn from (seed, i) says

Nothing is remembered while iterating: a stream that begins at window n (`skip`) gives what one from the
beginning gives after n windows, in this process or another, so a resumed run sees what an unbroken one saw.
Every process of a distributed run makes the same stream, and accelerate gives each its batches of it.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from relufy.errors import UserError
from relufy.text import check_ids
from relufy.train.encoding import highest_token, token_chunks
from relufy.train.texts import HubText, LocalText

SHUFFLE_TOKENS = 1 << 21
"""Tokens of a streamed source that wait in its shuffle buffer: no window is given before it is full."""
DRAWS = 4096
"""How many windows' sources are drawn at once."""
_MIXTURE, _ORDER = 1, 2


@dataclass(frozen=True)
class StoredWindows:
    """A source in memory: token ids `[windows, tokens]` of any integer type, without the `bos` of each."""

    ids: np.ndarray
    bos: int | None

    def windows(self, seed: int, start: int) -> Iterator[np.ndarray]:
        """Yield windows, int64 `[window]`, from the `start`-th on: one seeded shuffle after the other."""
        for epoch in count(start // len(self.ids)):
            order = np.random.default_rng([seed, epoch]).permutation(len(self.ids))
            first = start % len(self.ids) if epoch == start // len(self.ids) else 0
            for place in order[first:]:
                yield opened(self.ids[place], self.bos)

    def about(self) -> dict[str, Any]:
        content = hashlib.sha256(self.ids.astype("<u4").tobytes())
        return {"windows": len(self.ids), "bos": self.bos, "sha256": content.hexdigest()}

    def check(self, vocab_size: int) -> None:
        """Raise UserError unless the ids fit a vocabulary."""
        check_ids(int(self.ids.min()), int(self.ids.max()), vocab_size)


@dataclass(frozen=True)
class StreamedWindows:
    """A source that is read, encoded and packed while it is used, and from its beginning in each epoch."""

    text: LocalText | HubText
    tokenizer: Any
    window: int

    def windows(self, seed: int, start: int) -> Iterator[np.ndarray]:
        """Yield windows, int64 `[window]`, from the `start`-th on; those before it are read once more."""
        return islice(self._epochs(seed), start, None)

    def about(self) -> dict[str, Any]:
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items())).encode()
        return {**self.text.about(), "vocabulary": hashlib.sha256(vocabulary).hexdigest()}

    def check(self, vocab_size: int) -> None:
        """Raise UserError unless all that the tokenizer can give fits a vocabulary."""
        check_ids(0, highest_token(self.tokenizer), vocab_size)

    def _epochs(self, seed: int) -> Iterator[np.ndarray]:
        bos = self.tokenizer.bos_token_id
        for epoch in count():
            is_empty = True
            pieces = self.text.pieces(self.tokenizer, [seed, epoch])
            packed = pack(token_chunks(pieces, self.tokenizer), self.window - (bos is not None))
            buffer_size = max(2, SHUFFLE_TOKENS // self.window)
            for body in shuffled(packed, buffer_size, np.random.default_rng([seed, epoch, _ORDER])):
                is_empty = False
                yield opened(body, bos)
            if is_empty:
                raise UserError(
                    f"{self.text} has fewer tokens than one window of {self.window}; give more text"
                )


class WindowStream(IterableDataset):
    """Yields `{"input_ids": int64 [window]}` for ever: a mixture of sources by weight.

    Always the same for the same arguments, whatever was iterated before; can be pickled.
    """

    def __init__(
        self,
        sources: tuple[StoredWindows | StreamedWindows, ...],
        weights: tuple[float, ...],
        window: int,
        seed: int,
        start: int = 0,
    ) -> None:
        assert len(sources) == len(weights) > 0
        self.sources, self.weights = sources, weights
        self.window, self.seed, self.start = window, seed, start

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return ({"input_ids": torch.from_numpy(window)} for window in self.windows())

    def windows(self) -> Iterator[np.ndarray]:
        """Yield windows, int64 `[window]`, each an array of its own."""
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise UserError("each worker of the data loader would give the same windows; use one, or none")
        taken = self._taken()
        lanes = [source.windows(self.seed, done) for source, done in zip(self.sources, taken, strict=True)]
        for lane in self._lanes():
            yield next(lanes[lane])

    def skip(self, num_windows: int) -> "WindowStream":
        """Return the stream from its window `num_windows` on. Streamed sources are read up to there."""
        return WindowStream(self.sources, self.weights, self.window, self.seed, self.start + num_windows)

    def take(self, num_windows: int) -> np.ndarray:
        """Return the first windows, int64 `[num_windows, window]`."""
        return np.stack(list(islice(self.windows(), num_windows)))

    @property
    def num_windows(self) -> int | None:
        """How many windows the sources have in all; None if some are streamed, so that nobody knows."""
        counts = [len(source.ids) for source in self.sources if isinstance(source, StoredWindows)]
        return sum(counts) if len(counts) == len(self.sources) else None

    def about(self) -> dict[str, Any]:
        """Return plain data that tells this text and order from others: what a resumed run compares.

        Stored sources are known by their tokens, streamed ones by names, sizes or the hub's revision.
        """
        weights = [weight / sum(self.weights) for weight in self.weights]
        listed = [
            {"weight": weight} | source.about() for source, weight in zip(self.sources, weights, strict=True)
        ]
        return {"window": self.window, "seed": self.seed, "sources": listed}

    def check(self, vocab_size: int) -> None:
        """Raise UserError unless the windows fit a vocabulary."""
        for source in self.sources:
            source.check(vocab_size)

    def _lanes(self) -> Iterator[int]:
        """Yield the place of each window's source, from `start` on."""
        for block in count(self.start // DRAWS):
            drawn = self._draws(block)
            yield from map(int, drawn[self.start % DRAWS :] if block == self.start // DRAWS else drawn)

    def _taken(self) -> np.ndarray:
        """Return how many of the windows before `start` came from each source."""
        if len(self.sources) == 1:
            return np.array([self.start])
        taken = np.zeros(len(self.sources), dtype=np.int64)
        for block in range(-(-self.start // DRAWS)):
            drawn = self._draws(block)[: self.start - block * DRAWS]
            taken += np.bincount(drawn, minlength=len(self.sources))
        return taken

    def _draws(self, block: int) -> np.ndarray:
        """Return the sources of the windows `block * DRAWS` and following."""
        if len(self.sources) == 1:
            return np.zeros(DRAWS, dtype=np.int64)
        shares = np.cumsum(self.weights)
        numbers = np.random.default_rng([self.seed, block, _MIXTURE]).random(DRAWS)
        return np.searchsorted(shares[:-1], numbers * shares[-1], side="right")


def opened(body: np.ndarray, bos: int | None) -> np.ndarray:
    """Return a window, int64, of its tokens and the one that opens it."""
    window = np.empty(len(body) + (bos is not None), dtype=np.int64)
    window[len(window) - len(body) :] = body
    if bos is not None:
        window[0] = bos
    return window


def pack(chunks: Iterator[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Yield the chunks' tokens in rows `[length]`; those at the end that fill none are left out."""
    waiting = np.empty(0, dtype=np.uint16)
    for chunk in chunks:
        waiting = np.concatenate([waiting, chunk])
        full = len(waiting) - len(waiting) % length
        yield from waiting[:full].reshape(-1, length)
        waiting = waiting[full:]


def shuffled(rows: Iterator[np.ndarray], size: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield all rows in another order: each takes the place of one drawn from a buffer of `size`."""
    buffer = [row.copy() for row in islice(rows, size)]
    for row in rows:
        place = int(generator.integers(size))
        yield buffer[place]
        buffer[place] = row.copy()
    for place in generator.permutation(len(buffer)):
        yield buffer[place]
