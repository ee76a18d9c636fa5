"""`relufy measure reuse`: what the engine's reuse of neurons costs in quality, and what it leaves unread."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from relufy.report.content import Figure, Section, Table, number
from relufy.report.lines import Curve, curves
from relufy.report.run import Run
from relufy.report.sections import overtime
from relufy.report.sections.cells import cell, flat

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


def _table(rows: Rows) -> Table:
    plain = [flat(row) for row in rows]
    columns = list(dict.fromkeys(key for row in plain for key in row if any(r.get(key) is not None for r in plain)))
    return Table("Settings", columns, [[cell(row.get(column)) for column in columns] for row in plain])


def _figures(found: Mapping[str, Any]) -> list[Figure]:
    """Draw perplexity over gamma and over the bytes that are read, a line for each policy."""
    by_policy: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in found["settings"]:
        by_policy[f"{row['policy']}, control" if row["is_control"] else row["policy"]].append(row)
    exact = found["exact"]
    level = (f"exact {number(exact['perplexity'])}", exact["perplexity"])
    over_gamma = [_curve(name, rows, lambda row: row["gamma"]) for name, rows in by_policy.items()]
    over_bytes = [_curve(name, rows, lambda row: row["bytes_per_token"] / 1e6) for name, rows in by_policy.items()]
    control = "A control reuses as many neurons, drawn at random."
    return [
        curves("Perplexity over gamma", over_gamma, "gamma, tokens", "perplexity", control, True, level=level),
        curves("Perplexity over bytes", over_bytes, "MB read for a token", "perplexity", control, level=level),
    ]


def _curve(name: str, rows: Rows, place: Any) -> Curve:
    points = sorted((place(row), row["perplexity"]) for row in rows)
    return Curve(name, [x for x, _ in points], [y for _, y in points], marker="o")
