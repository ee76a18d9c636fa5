"""`relufy compare`: the frontier of training-free methods, and the table behind it."""

from collections.abc import Mapping
from typing import Any

from relufy.report.comparison import comparison_svg
from relufy.report.content import Figure, Section, Table, number, share, with_error
from relufy.report.run import Run

SPARSITIES = ("intrinsic_zero_fraction", "cett_sparsity", "gate_only_sparsity", "model_level_sparsity")


def section(run: Run) -> Section:
    """Return the section of a comparison."""
    found = run.document
    rows = [row for row in found["rows"] if "perplexity" in row]
    dense = found["dense"]["perplexity"]
    return Section(
        title=f"Training-free methods: {found['model']}",
        lead=f"{found['windows']:,} windows of {found['window']} tokens; dense perplexity "
        f"{_perplexity(dense)}.",
        tables=[_quality(rows), _sparsities(found, rows)],
        figures=_frontier(found),
        notes=[*found["notes"], *_reasons(found)],
        definitions=found["definitions"],
    )


def _frontier(found: Mapping[str, Any]) -> list[Figure]:
    title = "Perplexity over what is not read"
    caption = "Dotted: as many entries drawn at random. Dashed: the greatest by an oracle."
    figures = [Figure(title, comparison_svg(found, "unread", title), caption)]
    if found["dense"]["bytes_engine"] is not None:
        title = "Perplexity over the bytes that are read"
        figures.append(Figure(title, comparison_svg(found, "bytes", title), caption))
    return figures


def _quality(rows: list[Mapping[str, Any]]) -> Table:
    controls = list(dict.fromkeys(name for row in rows for name in row["controls"]))
    cells = []
    for row in rows:
        difference, read = row["difference"], row["bytes_engine"]
        others = [
            _perplexity(row["controls"][c]["perplexity"]) if c in row["controls"] else "-" for c in controls
        ]
        cells.append(
            [
                f"{row['method']} {share(row['target'], 0)}",
                share(row["model_level_sparsity"]),
                _perplexity(row["perplexity"]),
                with_error(difference["mean"], difference["standard_error"], 4),
                *others,
                "-" if read is None else f"{read['dense'] / read['sparse']:.2f}x",
            ]
        )
    columns = ["method", "weights unread", "perplexity", "nats more than dense", *controls, "bytes: x less"]
    return Table("Quality", columns, cells)


def _control(row: Mapping[str, Any], name: str) -> str:
    return _perplexity(row["controls"][name]["perplexity"]) if name in row["controls"] else "-"


def _perplexity(found: Mapping[str, Any]) -> str:
    value, error = found["perplexity"], found["standard_error"]
    return with_error(value, None if error is None or value is None else error * value)


def _sparsities(found: Mapping[str, Any], rows: list[Mapping[str, Any]]) -> Table:
    named = [("dense", found["dense"]), *((f"{r['method']} {share(r['target'], 0)}", r) for r in rows)]
    cells = [[name, *(share(row[key]) for key in SPARSITIES)] for name, row in named]
    columns = ["", *(name.replace("_", " ") for name in SPARSITIES)]
    return Table("Sparsity, in four definitions", columns, cells)


def _reasons(found: Mapping[str, Any]) -> list[str]:
    return [
        f"{row['method']} {number(row['target'])}: {row['reason']}" for row in found["rows"] if row["reason"]
    ]
