"""The time that a search may take."""

import time
from collections.abc import Callable

from relufy.methods.setting import Progress, no_progress


class TimeUp(Exception):
    """The minutes are over; what was found so far counts."""


class Clock:
    """Counts a search's minutes, and shows how many are gone."""

    def __init__(
        self, minutes: float, progress: Progress = no_progress, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._now, self._start, self._seconds = now, now(), 60 * minutes
        self._progress = progress
        self._end = 1.0

    @property
    def share(self) -> float:
        """The share of the minutes that is gone."""
        return (self._now() - self._start) / self._seconds

    @property
    def minutes(self) -> float:
        """The minutes that are gone."""
        return (self._now() - self._start) / 60

    def until(self, share: float) -> None:
        """From now on `check` ends what runs beyond this share of the minutes."""
        self._end = share

    def check(self) -> None:
        """Raise TimeUp if the time is over."""
        gone = min(self.share, 1.0)
        self._progress("searching", round(gone * self._seconds), max(1, round(self._seconds)))
        if self.share >= self._end:
            raise TimeUp
