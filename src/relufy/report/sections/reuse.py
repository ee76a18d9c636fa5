"""`relufy measure reuse`: what the engine's reuse of neurons costs in quality, and what it leaves unread."""

from collections.abc import Mapping, Sequence
from typing import Any

from relufy.report.content import Figure, Section, Table
from relufy.report.lines import Curve, curves
from relufy.report.run import Run
from relufy.report.sections import overtime
from relufy.report.sections.cells import cell, flat

Rows = Sequence[Mapping[str, Any]]


def section(run: Run) -> Section:
    """Return the section of a measurement of reuse: gamma intervals, or rows of policies."""
    found = run.document
    rows = _rows(found)
    if rows is None:
        return overtime.section(run)
    return Section(
        title=f"Neuron reuse: {found.get('model', run.name)}",
        tables=[_table(rows)],
        figures=_figures(rows),
        notes=found.get("notes") or [],
        definitions=found.get("definitions") or {},
    )


def _rows(found: Mapping[str, Any]) -> Rows | None:
    """Return the list of rows that the document has, if it has one of policies."""
    for name in ("rows", "policies", "points"):
        rows = found.get(name)
        if isinstance(rows, list) and rows and all(isinstance(row, Mapping) for row in rows):
            return rows if "kind" not in rows[0] else None
    return None


def _table(rows: Rows) -> Table:
    plain = [flat(row) for row in rows]
    columns = list(dict.fromkeys(key for row in plain for key in row))
    return Table("Policies", columns, [[cell(row.get(column)) for column in columns] for row in plain])


def _figures(rows: Rows) -> list[Figure]:
    """Draw perplexity over the bytes that are read, where rows have both."""
    plain = [flat(row) for row in rows]
    quality = next((key for key in plain[0] if key.startswith("perplexity")), None)
    read = next((key for key in plain[0] if "bytes" in key and isinstance(plain[0][key], int | float)), None)
    if quality is None or read is None:
        return []
    points = sorted((row[read] / 1e6, row[quality]) for row in plain if row.get(read) and row.get(quality))
    line = Curve("policies", [x for x, _ in points], [y for _, y in points], marker="o")
    return [curves("Quality and bytes", [line], f"{read}, MB a token", "perplexity")]
