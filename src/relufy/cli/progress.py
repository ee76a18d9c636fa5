"""Progress on stderr: a live bar on a terminal, a plain line now and then elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from relufy.cli.output import stderr

PLAIN_SECONDS = 5.0
"""The least time between two plain lines of one task."""


class ProgressDisplay:
    """Shows tasks by name; `update(task, done, total, detail)` creates, moves and finishes them."""

    def __init__(self, console: Console = stderr) -> None:
        self._console = console
        self._bars: Progress | None = None
        self._tasks: dict[str, int] = {}
        self._plain: dict[str, tuple[float, float]] = {}

    def __enter__(self) -> "ProgressDisplay":
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True, elapsed_when_finished=True),
                TextColumn("{task.fields[detail]}", style="dim"),
            )
            self._bars = Progress(*columns, console=self._console)
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def update(self, task: str, done: int, total: int, detail: str = "") -> None:
        """Show that `done` of `total` (0: nobody knows) is done; `detail` is a few words beside it."""
        if self._bars is None:
            self._print_plain(task, done, total, detail)
            return
        if task not in self._tasks:
            self._tasks[task] = self._bars.add_task(task, total=total or None, detail=detail)
        self._bars.update(self._tasks[task], completed=done, total=total or None, detail=detail)  # type: ignore[arg-type]

    def _print_plain(self, task: str, done: int, total: int, detail: str) -> None:
        now = time.monotonic()
        started, printed = self._plain.setdefault(task, (now, 0.0))
        if (done < total or not total) and now - printed < PLAIN_SECONDS:
            return
        self._plain[task] = (started, now)
        left = (
            f", {(now - started) / done * (total - done):.0f} s left"
            if 0 < done < total and now > started
            else ""
        )
        share = f"{done}/{total}" if total else f"{done}"
        self._console.print(f"{task}: {share}{left}  {detail}".rstrip(), markup=False, soft_wrap=True)
