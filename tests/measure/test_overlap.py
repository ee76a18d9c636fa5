"""What held-out text shares with training or calibration text is found."""

import numpy as np

from relufy.measure.overlap import overlap


def test_overlap_finds_planted_repeats() -> None:
    random = np.random.default_rng(0)
    train, test = random.integers(0, 1000, (20, 40)), random.integers(0, 1000, (10, 40))
    clean = overlap(train, test)
    assert (clean.windows, clean.identical_windows, clean.ngram) == (10, 0, 13)
    assert (clean.ngrams, clean.seen_ngrams, clean.seen_share) == (10 * 28, 0, 0.0)
    test[2] = train[7]
    test[5, 3:18] = train[0, 20:35]
    planted = overlap(train, test)
    assert planted.identical_windows == 1
    assert planted.seen_ngrams == 28 + 3


def test_overlap_does_not_run_across_windows() -> None:
    train = np.arange(40).reshape(2, 20)
    assert overlap(train, np.arange(10, 30).reshape(1, 20)).seen_ngrams == 0


def test_overlap_of_short_windows_uses_their_length() -> None:
    found = overlap(np.arange(12).reshape(2, 6), np.arange(6).reshape(1, 6))
    assert (found.ngram, found.identical_windows, found.seen_share) == (6, 1, 1.0)
