"""Reading results for a report: JSON documents by their kind, and the logs of trainings."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from relufy.document import read_document
from relufy.errors import UserError
from relufy.report.content import Section
from relufy.schema import suggest

TRAINING = "relufy.training"
"""The kind that a training's log gets here; its lines have none."""
READERS = {
    "relufy.measure": "measure",
    "relufy.measure.overtime": "overtime",
    "relufy.measure.reuse": "reuse",
    "relufy.measure.extended": "overtime",
    "relufy.compare": "compare",
    "relufy.eval": "evaluation",
    "relufy.doctor": "doctor",
    "relufy.bench": "bench",
    TRAINING: "training",
}
"""Kind -> the module of `sections` that reads it; a kind that begins with another one is read as that."""
DAMAGED = (KeyError, TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError)


@dataclass(frozen=True)
class Run:
    """A result as it was written."""

    path: Path
    kind: str
    document: dict[str, Any]

    @property
    def name(self) -> str:
        return self.path.name


def read_run(path: Path) -> Run:
    """Read a result. Raises UserError for any other file, naming it and what was expected."""
    if path.is_dir():
        path = _log_of(path)
    if path.suffix == ".jsonl":
        return Run(path, TRAINING, {"kind": TRAINING, "reports": _reports(path)})
    document = read_document(path)
    kind = document["kind"]
    if reader_of(kind) is None:
        raise UserError(f"{path}: the kind {kind!r} has no report{suggest(kind, list(READERS))}")
    return Run(path, kind, document)


def reader_of(kind: str) -> str | None:
    """Return the name of the module that reads a kind, the longest that it begins with; None if none does."""
    known = [name for name in READERS if kind == name or kind.startswith(f"{name}.")]
    return READERS[max(known, key=len)] if known else None


def section_of(run: Run) -> Section:
    """Return what a run says. Raises UserError if the document lacks what its kind promises."""
    reader: Callable[[Run], Section] = import_module(f"relufy.report.sections.{reader_of(run.kind)}").section
    try:
        return reader(run)
    except DAMAGED as error:
        reason = f"{type(error).__name__} {' '.join(str(error).split())[:80]}"
        raise UserError(
            f"{run.path} is no whole {run.kind} document ({reason}); write it again with --json"
        ) from error


def _log_of(folder: Path) -> Path:
    """Return the log in the folder of a training."""
    found = sorted(folder.glob("*.jsonl"))
    if len(found) != 1:
        raise UserError(f"{folder}: expected one training log (.jsonl) in the folder, found {len(found)}")
    return found[0]


def _reports(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a training's log; a last line that its run's end cut short is left out."""
    if not path.is_file():
        raise UserError(f"there is no training log {path}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        reports = [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{path} is no training log: {' '.join(str(error).split())}") from None
    if not reports or not all(isinstance(report, dict) and "step" in report for report in reports):
        raise UserError(f"{path} is no training log: expected a line of JSON with its 'step' for each report")
    return reports
