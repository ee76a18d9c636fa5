"""Text files in, windows of tokens out: the one way that training, measuring and the demo cut text."""

import codecs
import gzip
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relufy.errors import UserError

PIECE = 1 << 20
"""Characters that are encoded at once, or some more."""

Encode = Callable[[str], Sequence[int]]
"""Text to token ids, without special tokens."""


def read_text(paths: Sequence[Path | str]) -> str:
    """Return the files' text (UTF-8, also `.gz`), joined by newlines. Raises UserError if there is none."""
    text = "".join(_joined(paths))
    if not text.strip():
        raise UserError(f"no text in {', '.join(map(str, paths))}")
    return text


def lines(path: Path, longest: int) -> Iterator[str]:
    """Yield lines of a text file, those of more than `longest` bytes in parts. Raises UserError."""
    if not path.is_file():
        raise UserError(f"there is no text file {path}")
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            while part := stream.readline(longest):
                yield decoder.decode(part)
            decoder.decode(b"", final=True)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not UTF-8 text{' in gzip' * (path.suffix == '.gz')}: {error}") from None


def _joined(paths: Sequence[Path | str]) -> Iterator[str]:
    """Yield the lines of all files, a newline between two of them."""
    for number, path in enumerate(map(Path, paths)):
        if number:
            yield "\n"
        yield from lines(path, PIECE)


def _pieces(paths: Sequence[Path | str]) -> Iterator[str]:
    """Yield the text in pieces of PIECE characters or some more, cut where a line follows on another.

    There byte-level tokenizers give the same tokens as for the whole text; those that put a space before
    each text (sentencepiece) may differ by one. Where there is no such place, a piece ends anyhow.
    """
    waiting: list[str] = []
    size = 0
    for line in _joined(paths):
        is_border = waiting and waiting[-1][-1:] == "\n" and waiting[-1].strip() and not line[:1].isspace()
        if size >= PIECE and (is_border or size >= 2 * PIECE):
            yield "".join(waiting)
            waiting, size = [], 0
        waiting.append(line)
        size += len(line)
    if waiting:
        yield "".join(waiting)


def token_windows(text: str, encode: Encode, length: int, bos: int | None) -> np.ndarray:
    """Cut a text into windows of `length` tokens, int64 `[windows, length]`, each opened by `bos` if given.

    The tail that fills no window is left out. Raises UserError if the text is shorter than one window.
    """
    ids = np.asarray(encode(text), dtype=np.int64)
    body = length - (bos is not None)
    count = len(ids) // body
    if count == 0:
        raise UserError(f"the text has {len(ids)} tokens, fewer than one window of {body}; give more text")
    windows = ids[: count * body].reshape(count, body)
    return windows if bos is None else np.insert(windows, 0, bos, axis=1)


def draw_windows(windows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return at most `count` of the windows, drawn without replacement, in their order."""
    if len(windows) <= count:
        return windows
    drawn = np.random.default_rng(seed).choice(len(windows), count, replace=False)
    return windows[np.sort(drawn)]


def refuse_long_windows(length: int, longest: int | None, advice: str = "") -> None:
    """Raise UserError if windows are longer than the positions that a model has."""
    if longest and length > longest:
        raise UserError(
            f"windows of {length} tokens are longer than the {longest} that the model can read{advice}"
        )


def check_windows(windows: np.ndarray, vocab_size: int) -> None:
    """Raise UserError unless `windows` is whole numbers `[windows, length]` within this vocabulary."""
    if windows.ndim != 2 or not np.issubdtype(windows.dtype, np.integer):
        raise UserError(f"expected integers [windows, length], found {windows.dtype} {list(windows.shape)}")
    if len(windows) == 0 or windows.shape[1] < 2:
        raise UserError(f"expected at least one window of at least 2 tokens, found {list(windows.shape)}")
    check_ids(windows.min(), windows.max(), vocab_size)


def check_ids(lowest: int, highest: int, vocab_size: int) -> None:
    """Raise UserError unless token ids from `lowest` to `highest` are within a vocabulary."""
    if lowest < 0 or highest >= vocab_size:
        raise UserError(
            f"token ids from {lowest} to {highest} do not fit a vocabulary of {vocab_size}; "
            "give text encoded by this model's tokenizer"
        )


def read_windows(paths: Sequence[Path | str], tokenizer: Any, length: int) -> np.ndarray:
    """Read files and cut them by a transformers tokenizer, whose first special token opens each window.

    Int64 `[windows, length]`; raises UserError as TextWindows.
    """
    return np.stack(list(TextWindows(paths, tokenizer, length)))


class TextWindows:
    """Windows of files, int64 `[length]` each, read and encoded while they are asked for, in little memory.

    `left_out` is how many tokens at the end filled no window, when all have been asked for. Raises UserError
    for files that are no text, and a text shorter than one window.
    """

    def __init__(self, paths: Sequence[Path | str], tokenizer: Any, length: int) -> None:
        self._paths, self._tokenizer = paths, tokenizer
        bos = tokenizer.bos_token_id
        self._opening = np.array([] if bos is None else [bos], dtype=np.int64)
        self._body = length - len(self._opening)
        self.left_out = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        waiting = np.zeros(0, dtype=np.int64)
        is_empty = is_short = True
        for piece in _pieces(self._paths):
            is_empty = is_empty and not piece.strip()
            ids = self._tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
            waiting = np.concatenate([waiting, np.asarray(ids, dtype=np.int64)])
            whole = len(waiting) - len(waiting) % self._body
            is_short = is_short and not whole
            for start in range(0, whole, self._body):
                yield np.concatenate([self._opening, waiting[start : start + self._body]])
            waiting = waiting[whole:]
        if is_empty:
            raise UserError(f"no text in {', '.join(map(str, self._paths))}")
        if is_short:
            raise UserError(
                f"the text has {len(waiting)} tokens, fewer than one window of {self._body}; give more text"
            )
        self.left_out = len(waiting)
