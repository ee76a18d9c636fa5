"""What a run reports, kept in its folder: a line of JSON for each report, and TensorBoard's events."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from relufy.errors import UserError
from relufy.files import replacing

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LOG_FILE = "log.jsonl"
EVENTS_FOLDER = "tensorboard"


class Logbook:
    """Appends to the log of a run; only the main process should have one.

    Each line is on its way to disk when `write` returns. Raises UserError where events are wanted and the
    package `tensorboard` is missing.
    """

    def __init__(self, folder: Path, tensorboard: bool = False) -> None:
        self.path = folder / LOG_FILE
        self._events_folder = folder / EVENTS_FOLDER
        self._wants_events = tensorboard
        self._first_step: int | None = None
        self._events: SummaryWriter | None = None
        if tensorboard:
            _summary_writer()
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = self.path.open("a", encoding="utf-8")

    def resume_at(self, step: int) -> None:
        """Drop what was reported of later steps, and a line that was cut short; 0 begins a new log.

        To be called before the first `write`.
        """
        assert self._events is None
        self._first_step = step + 1
        self._lines.close()
        kept = [log for log in read_log(self.path) if log["step"] <= step]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(_line(log) for log in kept), encoding="utf-8")
        self._lines = self.path.open("a", encoding="utf-8")

    def write(self, log: Mapping[str, Any]) -> None:
        """Write a report, which has its `step`; numbers that are not finite become null in JSON."""
        self._lines.write(_line(log))
        self._lines.flush()
        if not self._wants_events:
            return
        if self._events is None:
            self._events = _summary_writer()(str(self._events_folder), purge_step=self._first_step)
        for name, value in scalars(log):
            self._events.add_scalar(name, value, log["step"])
        self._events.flush()

    def close(self) -> None:
        self._lines.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> "Logbook":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the reports in a log file. A last line that was cut short by the end of its run is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [json.loads(line) for line in lines]


def scalars(log: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield what of a report can be drawn over steps, by name; a list over layers also gives its mean."""
    for key, value in log.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from scalars(value, f"{name}/")
        elif isinstance(value, list) and value:
            yield name, sum(value) / len(value)
            yield from ((f"{name}/layer_{layer}", number) for layer, number in enumerate(value))
        elif isinstance(value, int | float) and name != "step":
            yield name, value


def _line(log: Mapping[str, Any]) -> str:
    return json.dumps(_finite(log), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _summary_writer() -> "type[SummaryWriter]":
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "TensorBoard's events need the package tensorboard: pip install 'relufy[tensorboard]', or leave "
            "them out"
        ) from None
    return SummaryWriter
