"""What `--data` takes, and the stream of windows that it becomes.

PATH[#FIELD][=WEIGHT]    a file, a folder or a glob; hub:owner/name[@revision][:config[:split]]
"""

import glob
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from relufy.errors import UserError
from relufy.train.encoding import Piece, token_chunks
from relufy.train.rows import KINDS, TEXT_FIELD, kind_of
from relufy.train.stream import StoredWindows, StreamedWindows, WindowStream
from relufy.train.texts import HubText, LocalText, parse_hub

HUB = "hub:"
STREAM_ABOVE = 1 << 30
"""Bytes of text in files above which they are streamed: about 250 million tokens, 0.5 to 1 GB in memory."""

Progress = Callable[[int, int], None]
"""Called with the characters that are encoded, and about how many there are."""


@dataclass(frozen=True)
class Source:
    """Where text is, how much of the training it makes up, and which field of its rows is text."""

    where: str
    weight: float | None = None
    """A share of the windows, relative to the other sources'. None: its share of all the text there is."""
    field: str = TEXT_FIELD

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise UserError(f"the weight of {self.where} must be a positive number, found {self.weight}")
        if not self.where or not self.field:
            raise UserError("expected PATH, PATH#FIELD or PATH=WEIGHT, found an empty path or field")


def parse_source(text: str) -> Source:
    """Read `PATH[#FIELD][=WEIGHT]`. What exists under its whole name is a path, whatever is in the name.

    So a file `a=1` is `a=1`, and with a weight `a=1=0.5`. Raises UserError.
    """
    where, weight = text, None
    if "=" in text and not os.path.exists(text):
        head, _, tail = text.rpartition("=")
        number = _number(tail)
        where, weight = (text, None) if number is None else (head, number)
    if "#" in where and not os.path.exists(where):
        where, _, field = where.rpartition("#")
        return Source(where, weight, field)
    return Source(where, weight)


def open_windows(
    sources: Sequence[Source | str],
    tokenizer: Any,
    window: int,
    seed: int,
    *,
    stream: bool | None = None,
    own: np.ndarray | None = None,
    own_weight: float | None = None,
    progress: Progress | None = None,
) -> WindowStream:
    """Return the windows of the sources, each of `window` tokens, opened by the tokenizer's first token.

    Without weights all text is one, seen once in each epoch; with them (on all sources, or none) a window
    comes from each as often as its weight says. `stream` says whether to read text as it is used; by default
    that is so for the hub and for large files. `own` is one more source: windows that are cut already, int64
    `[windows, window]`.
    Raises UserError, for damaged rows of streamed text only when they are reached.
    """
    if window < 2:
        raise UserError(f"window must be at least 2 tokens, found {window}")
    given = [parse_source(source) if isinstance(source, str) else source for source in sources]
    weights = [source.weight for source in given] + ([own_weight] if own is not None else [])
    texts = [open_text(source) for source in given]
    if own is None and len(texts) > 1 and not any(weights):
        texts, weights = [_joined(texts)], [None]
    opened: list[StoredWindows | StreamedWindows] = [
        _windows(text, tokenizer, window, stream, progress) for text in texts
    ]
    if own is not None:
        opened.append(_own_windows(own, window))
    return WindowStream(tuple(opened), _complete(weights), window, seed)


def find_files(where: str) -> list[Path]:
    """Return a file, or all files of known kinds in a folder or a glob, sorted. Raises UserError."""
    path = Path(where)
    if path.is_file():
        if kind_of(path) is None:
            raise UserError(f"{path} is of no known kind; it must end with one of {', '.join(KINDS)}")
        return [path]
    if path.is_dir():
        found = [file for file in path.rglob("*") if not _is_hidden(file.relative_to(path))]
    else:
        found = [Path(name) for name in glob.glob(where, recursive=True)]
    files = sorted(file for file in found if kind_of(file) is not None and file.is_file())
    if found and not files:
        raise UserError(f"{where} holds no file that ends with one of {', '.join(KINDS)}")
    if not files:
        raise UserError(f"there is no text file {where} (hub:owner/name is a data set on the hub)")
    return files


def open_text(source: Source) -> LocalText | HubText:
    """Return the text of a source, found but not read. Raises UserError if it is not there."""
    if source.where.startswith(HUB):
        return parse_hub(source.where, source.field)
    return LocalText(tuple((path, source.field) for path in find_files(source.where)))


def _joined(texts: Sequence[LocalText | HubText]) -> LocalText:
    files = []
    for text in texts:
        if isinstance(text, HubText):
            raise UserError(
                f"how much text {text} has is not known; give each source a weight, as in PATH=0.5"
            )
        files += text.files
    return LocalText(tuple(files))


def _complete(weights: Sequence[float | None]) -> tuple[float, ...]:
    """Return the weights; one source needs none, several all of them."""
    if not weights:
        raise UserError("there is no text to train on; give a file, a folder or hub:owner/name")
    if len(weights) == 1:
        return (1.0,)
    complete = tuple(weight for weight in weights if weight is not None)
    if len(complete) < len(weights):
        raise UserError("some sources have a weight and some have none; give each one, as in PATH=0.5")
    return complete


def _windows(
    text: LocalText | HubText, tokenizer: Any, window: int, stream: bool | None, progress: Progress | None
) -> StoredWindows | StreamedWindows:
    is_large = isinstance(text, HubText) or text.size() > STREAM_ABOVE
    if is_large if stream is None else stream:
        if next(iter(text.pieces(tokenizer)), None) is None:
            raise UserError(f"no text in {text}")
        return StreamedWindows(text, tokenizer, window)
    pieces = text.pieces(tokenizer)
    if progress is not None and isinstance(text, LocalText):
        pieces = _reported(pieces, text.size(), progress)
    return _stored_windows(text, pieces, tokenizer, window)


def _reported(pieces: Iterator[Piece], size: int, progress: Progress) -> Iterator[Piece]:
    done = 0
    for piece in pieces:
        progress(min(done, size), size)
        done += len(piece[0])
        yield piece
    progress(size, size)


def _stored_windows(
    text: LocalText | HubText, pieces: Iterator[Piece], tokenizer: Any, window: int
) -> StoredWindows:
    bos = tokenizer.bos_token_id
    body = window - (bos is not None)
    chunks = list(token_chunks(pieces, tokenizer))
    num_tokens = sum(map(len, chunks))
    if not num_tokens:
        raise UserError(f"no text in {text}")
    if num_tokens < body:
        raise UserError(f"{text}: {num_tokens} tokens, fewer than one window of {body}; give more text")
    ids = np.concatenate(chunks)
    return StoredWindows(ids[: num_tokens - num_tokens % body].reshape(-1, body), bos)


def _own_windows(own: np.ndarray, window: int) -> StoredWindows:
    if own.ndim != 2 or own.shape[1] != window or not len(own):
        raise UserError(f"expected windows of {window} tokens, found {list(own.shape)}")
    return StoredWindows(own, None)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
