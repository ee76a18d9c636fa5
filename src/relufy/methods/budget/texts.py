"""The three texts of the automatic search: to calibrate on, to decide by, and to report.

They must be disjoint, else what is reported is what was chosen for.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from relufy.errors import UserError
from relufy.text import check_windows

SHARES = {"calibration": 0.3, "selection": 0.4, "test": 0.3}
"""What each gets of one stream. Decisions need most: their bound narrows with the number of windows."""
LEAST_WINDOWS = 8
"""Fewer windows give no standard error worth the name."""
PARTS = 30
"""One stream is cut into about so many runs of neighbouring windows."""


@dataclass(frozen=True)
class Texts:
    """Windows of tokens, int64 `[windows, length]`, that are in one of the three only."""

    calibration: np.ndarray
    selection: np.ndarray
    test: np.ndarray

    def check(self, vocab_size: int) -> None:
        """Raise UserError if a text is too short, does not fit the model, or shares a window with another."""
        for name in SHARES:
            windows = getattr(self, name)
            check_windows(windows, vocab_size)
            if len(windows) < LEAST_WINDOWS:
                raise UserError(
                    f"the {name} text has {len(windows)} windows of {windows.shape[1]} tokens, "
                    f"needed are {LEAST_WINDOWS} or more; give more text, or shorter windows"
                )
        for one, other in combinations(SHARES, 2):
            if shared := _bodies(getattr(self, one)) & _bodies(getattr(self, other)):
                raise UserError(
                    f"the {one} and the {other} text share {len(shared)} windows; give different texts"
                )

    def sizes(self) -> dict[str, int]:
        """Return the tokens of each text."""
        return {name: int(getattr(self, name).size) for name in SHARES}


def split(windows: np.ndarray, seed: int) -> Texts:
    """Deal one stream of windows out to the three texts, in runs of neighbours. Raises UserError if short.

    Windows that occur twice are kept once, so that no two texts share one.
    """
    _, firsts = np.unique(windows, axis=0, return_index=True)
    windows = windows[np.sort(firsts)]
    needed = int(np.ceil(LEAST_WINDOWS / min(SHARES.values()))) + 1
    if len(windows) < needed:
        raise UserError(
            f"the text has {len(windows)} different windows of {windows.shape[1]} tokens; to calibrate, to "
            f"select and to test takes {needed} or more ({needed * windows.shape[1]} tokens)"
        )
    runs = np.array_split(np.arange(len(windows)), min(PARTS, len(windows)))
    order = np.random.default_rng(seed).permutation(len(runs))
    dealt = np.concatenate([runs[index] for index in order])
    ends = np.round(np.cumsum(list(SHARES.values())) * len(dealt)).astype(int)
    parts = np.split(dealt, ends[:-1])
    return Texts(*(windows[np.sort(part)] for part in parts))


def _bodies(windows: np.ndarray) -> set[bytes]:
    return {window[1:].tobytes() for window in windows}
