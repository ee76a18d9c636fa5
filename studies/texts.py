"""The text of a study: tokenized once into a folder, and read from there by every job.

python -m studies.texts WORK --train train.txt.gz --valid valid.txt --test test.txt
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import numpy as np

from relufy.model.checkpoint import load_tokenizer
from relufy.text import read_text, read_windows

WINDOW = 256
PIECE = 1 << 20
"""Characters that are tokenized at a time."""


class Texts:
    """Windows for training, validation and test, of a folder that `prepare` has written."""

    def __init__(self, work: Path) -> None:
        self.work = work

    @functools.cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer((self.work / "tokenizer.txt").read_text().strip())

    @functools.cached_property
    def valid(self) -> np.ndarray:
        return np.load(self.work / "valid.npy").astype(np.int64)

    @functools.cached_property
    def test(self) -> np.ndarray:
        return np.load(self.work / "test.npy").astype(np.int64)

    def train(self, window: int) -> np.ndarray:
        """Return training windows, int64 `[windows, window]`, each opened by the first special token."""
        ids = np.load(self.work / "train.npy", mmap_mode="r")
        body = window - 1
        count = len(ids) // body
        windows = np.empty((count, window), np.int64)
        windows[:, 0] = self.tokenizer.bos_token_id
        windows[:, 1:] = ids[: count * body].reshape(count, body)
        return windows


def prepare(work: Path, tokenizer_of: str, train: Path, valid: Path, test: Path) -> None:
    """Tokenize the files. The training text is cut into pieces at ends of lines."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "tokenizer.txt").write_text(tokenizer_of)
    tokenizer = load_tokenizer(tokenizer_of)
    for name, file in (("valid", valid), ("test", test)):
        np.save(work / f"{name}.npy", read_windows([file], tokenizer, WINDOW).astype(np.uint16))
    pieces = _pieces(read_text([train]))
    encoded = tokenizer(pieces, add_special_tokens=False, verbose=False).input_ids
    np.save(work / "train.npy", np.concatenate([np.asarray(ids, np.uint16) for ids in encoded]))


def _pieces(text: str) -> list[str]:
    pieces, start = [], 0
    while start < len(text):
        end = text.find("\n", start + PIECE) + 1 or len(text)
        pieces.append(text[start:end])
        start = end
    return pieces


def main() -> None:
    """Tokenize the files named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    for name in ("train", "valid", "test"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--tokenizer", default="bundled", help="the model whose tokenizer is used")
    options = parser.parse_args()
    prepare(options.work, options.tokenizer, options.train, options.valid, options.test)


if __name__ == "__main__":
    main()
