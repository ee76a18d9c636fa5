"""Text files in, windows of tokens out: the one way that training, measuring and the demo cut text."""

import functools
import gzip
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relufy.errors import UserError

Encode = Callable[[str], Sequence[int]]
"""Text to token ids, without special tokens."""


def read_text(paths: Sequence[Path | str]) -> str:
    """Return the files' text (UTF-8, also `.gz`), joined by newlines. Raises UserError if there is none."""
    parts = []
    for path in map(Path, paths):
        if not path.is_file():
            raise UserError(f"there is no text file {path}")
        try:
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            parts.append(raw.decode("utf-8"))
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(
                f"{path} is not UTF-8 text{' in gzip' * (path.suffix == '.gz')}: {error}"
            ) from None
    text = "\n".join(parts)
    if not text.strip():
        raise UserError(f"no text in {', '.join(map(str, paths))}")
    return text


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
    """Read files and cut them by a transformers tokenizer, whose first special token opens each window."""
    encode = functools.partial(tokenizer, add_special_tokens=False, verbose=False)
    return token_windows(
        read_text(paths), lambda text: encode(text).input_ids, length, tokenizer.bos_token_id
    )
