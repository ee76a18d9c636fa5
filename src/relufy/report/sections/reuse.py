"""`relufy measure reuse`: what the engine's reuse of neurons costs in quality, and what it leaves unread."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from relufy.report.content import Figure, Section, Table
from relufy.report.lines import Curve, curves
from relufy.report.run import Run
from relufy.report.sections import overtime
from relufy.report.sections.cells import cell

Rows = Sequence[Mapping[str, Any]]


def section(run: Run) -> Section:
    """Return the section of a measurement of reuse by the engine, or of gamma intervals alone."""
    found = run.document
    if "settings" not in found:
        return overtime.section(run)
    exact = found["exact"]
    return Section(
        title=f"Neuron reuse: {found['model']}",
        lead=f"{found['tokens']:,} tokens in {found['windows']:,} windows; exact: perplexity "
        f"{exact['perplexity']:.2f}, {exact['bytes_per_token'] / 1e6:.2f} MB a token.",
        tables=[_table(found["settings"])],
        figures=_figures(found),
        notes=found.get("notes") or [],
        definitions=found.get("definitions") or {},
    )


COLUMNS = {
    "perplexity": "perplexity",
    "perplexity_change_percent": "change, %",
    "standard_error_percent": "s.e., %",
    "bytes_vs_exact": "bytes / exact",
    "candidate_share": "candidates",
    "fired_share": "fired",
    "tokens_per_second": "tokens/s",
    "speedup_vs_exact": "x exact",
    "speedup_vs_dense": "x dense",
}


def _table(rows: Rows) -> Table:
    names = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    cells = [[row["label"], *(cell(row.get(name)) for name in names)] for row in rows]
    return Table("Settings", ["setting", *(COLUMNS[name] for name in names)], cells)


def _figures(found: Mapping[str, Any]) -> list[Figure]:
    """Draw perplexity over the period and over the bytes that are read, a line for each policy."""
    by_policy: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in found["settings"]:
        own = row["reuse"]
        by_policy[f"{own['policy']}, random sets" if own["is_control"] else own["policy"]].append(row)
    exact = found["exact"]["perplexity"]
    figures = []
    for title, x, place, is_log in (
        ("Perplexity over the period", "period, tokens", _period, True),
        ("Perplexity over bytes", "MB read for a token", _megabytes, False),
    ):
        lines = [_curve(name, rows, place) for name, rows in by_policy.items()]
        caption = "Random sets hold as many neurons as the window does."
        level = (f"exact {exact:.2f}", exact)
        figures.append(curves(title, lines, x, "perplexity", caption, is_log, level=level))
    return figures


def _period(row: Mapping[str, Any]) -> float:
    return row["reuse"]["period"]


def _megabytes(row: Mapping[str, Any]) -> float:
    return row["bytes_per_token"] / 1e6


def _curve(name: str, rows: Rows, place: Callable[[Mapping[str, Any]], float]) -> Curve:
    points = sorted((place(row), row["perplexity"]) for row in rows)
    return Curve(name, [x for x, _ in points], [y for _, y in points], marker="o")
