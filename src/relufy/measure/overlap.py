"""How much of one text is in another: whether held-out text was seen in training or calibration."""

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

NGRAM = 13
"""The length in use for finding test text in training text since GPT-3 (arXiv 2005.14165, appendix C)."""


@dataclass(frozen=True)
class Overlap:
    """What of the held-out windows is in the training windows. N-grams lie within a window."""

    windows: int
    identical_windows: int
    ngram: int
    ngrams: int
    seen_ngrams: int

    @property
    def seen_share(self) -> float:
        return self.seen_ngrams / self.ngrams


def overlap(train: np.ndarray, test: np.ndarray, ngram: int = NGRAM) -> Overlap:
    """Return how much of the held-out windows was seen in training; both are int64 `[windows, length]`.

    Windows shorter than `ngram` are compared by n-grams of their own length.
    """
    ngram = min(ngram, train.shape[1], test.shape[1])
    seen, held_out = (_ngrams(windows, ngram) for windows in (train, test))
    known = {window.tobytes() for window in train}
    in_training = set(seen)
    return Overlap(
        windows=len(test),
        identical_windows=sum(window.tobytes() in known for window in test),
        ngram=ngram,
        ngrams=len(held_out),
        seen_ngrams=sum(gram in in_training for gram in held_out),
    )


def _ngrams(windows: np.ndarray, ngram: int) -> list[bytes]:
    grams = sliding_window_view(windows, ngram, axis=1).reshape(-1, ngram)
    return [gram.tobytes() for gram in grams]
