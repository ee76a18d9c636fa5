"""Perplexity of a text per token, per byte and per word, in one pass and bounded memory.

Every token is predicted once, but for the text's very first where no special token begins texts. A window
opens with that token or, without one, with the last token of the window before. Bytes are those of the UTF-8
text that the predicted tokens cover; words are what whitespace separates, counted where they begin.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np

from relufy.errors import UserError
from relufy.evaluation.scores import Scores, bits_per_unit, perplexity_per_unit

Encode = Callable[[str], tuple[Sequence[int], Sequence[int]]]
"""Text to its tokens, without special ones, and at which character each of them ends."""


@dataclass(frozen=True)
class Window:
    """Tokens to read, and how many tokens, bytes and words are predicted: all but the first one's."""

    tokens: tuple[int, ...]
    num_predicted: int
    bytes: int
    words: int
    fingerprint: str = ""

    def without_tokens(self) -> "Window":
        """Return what is kept of a window that has been read: a fingerprint instead of the tokens."""
        return replace(self, tokens=(), fingerprint=sha256(repr(self.tokens).encode()).hexdigest()[:16])


def text_windows(pieces: Iterable[str], encode: Encode, length: int, bos: int | None) -> Iterator[Window]:
    """Yield windows of at most `length` tokens; the last one has what is left. Raises UserError if none."""
    tokens: list[int] = []
    units = np.zeros((0, 2), np.int64)
    head = None if bos is None else bos
    body, count, last = length - 1, 0, " "
    for piece in pieces:
        ids, ends = encode(piece)
        tokens += ids
        units = np.concatenate([units, _units(piece, ends, last)])
        last = piece[-1:] or last
        if head is None and tokens:
            head, tokens, units = tokens[0], tokens[1:], units[1:]
        while len(tokens) >= body and head is not None:
            yield _window(head, tokens[:body], units[:body])
            head = tokens[body - 1] if bos is None else bos
            tokens, units, count = tokens[body:], units[body:], count + 1
    if tokens and head is not None:
        yield _window(head, tokens, units)
    elif not count:
        raise UserError("the text is too short: it has no token that could be predicted")


def _window(head: int, tokens: Sequence[int], units: np.ndarray) -> Window:
    return Window((head, *tokens), len(tokens), int(units[:, 0].sum()), int(units[:, 1].sum()))


def _units(piece: str, ends: Sequence[int], before: str) -> np.ndarray:
    """Return the bytes and the beginnings of words that each token of a piece adds, [tokens, 2].

    `before` is the character before the piece. What comes after the last token's end counts as its own.
    """
    points = np.frombuffer(piece.encode("utf-32-le"), np.uint32)
    sizes = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    is_space = np.array([character.isspace() for character in before + piece])
    starts = ~is_space[1:] & is_space[:-1]
    totals = np.zeros((len(piece) + 1, 2), np.int64)
    totals[1:] = np.cumsum(np.stack([sizes, starts], axis=1), axis=0)
    borders = np.maximum.accumulate(np.array([0, *ends], dtype=np.int64))
    if len(ends):
        borders[-1] = len(piece)
    return np.diff(totals[borders], axis=0)


def text_scores(windows: Sequence[Window], logprobs: Sequence[float]) -> list[Scores]:
    """Return perplexity per token, per byte and per word, and bits per byte, from each window's total."""
    documents = tuple(window.fingerprint for window in windows)
    units = {
        "perplexity per token": [window.num_predicted for window in windows],
        "perplexity per byte": [window.bytes for window in windows],
        "perplexity per word": [window.words for window in windows],
    }
    found = [
        Scores(
            "text", name, "weighted_perplexity", tuple(zip(logprobs, counts, strict=True)), documents,
            perplexity_per_unit, higher_is_better=False,
        )
        for name, counts in units.items()
        if sum(counts)
    ]  # fmt: skip
    bits = tuple((logprob, window.bytes) for logprob, window in zip(logprobs, windows, strict=True))
    return [
        *found,
        Scores("text", "bits per byte", "bits_per_unit", bits, documents, bits_per_unit, False),
    ]
