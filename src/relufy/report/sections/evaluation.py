"""`relufy eval`: scores before and after, with errors and verdicts."""

from collections.abc import Mapping
from typing import Any

from relufy.plot_style import DENSE, SPARSE
from relufy.report.content import Figure, Section, Table, number, with_error
from relufy.report.lines import WIDTH
from relufy.report.run import Run
from relufy.report.sections.cells import cell, flat
from relufy.report.svg import PAGE_INK, draw


def section(run: Run) -> Section:
    """Return the section of an evaluation."""
    found = run.document
    rows = [*((found.get("text") or {}).get("rows") or []), *found["tasks"]]
    beside = f" beside {found['before']}" if found.get("before") else ""
    return Section(
        title=f"Evaluated: {found['model']}{beside}",
        lead=_lead(found),
        tables=[_table(rows, bool(found.get("before"))), _how(found)],
        figures=_figures([row for row in rows if row["before"]]),
        notes=found.get("notes") or [],
        definitions=found.get("definitions") or {},
    )


def _lead(found: Mapping[str, Any]) -> str:
    text = found.get("text")
    return (
        f"Text: {text['tokens']:,} tokens in {text['windows']:,} windows of {text['window']}." if text else ""
    )


def _table(rows: list[Mapping[str, Any]], has_before: bool) -> Table:
    both = ["before", "after", "difference", "p"] if has_before else ["score"]
    cells = []
    for row in rows:
        scores = [_score(row["before"]), _score(row["after"])] if has_before else [_score(row["after"])]
        change = [_signed(row), "-" if row["p"] is None else f"{row['p']:.2g}"] if has_before else []
        name = f"\u2003{row['name']}" if row.get("group") else row["name"]
        cells.append([name, row["metric"], f"{row['num_docs']:,}", *scores, *change, row["verdict"]])
    return Table("Scores", ["task", "metric", "docs", *both, "verdict"], cells)


def _score(figure: Mapping[str, Any] | None) -> str:
    return with_error(figure["value"], figure["standard_error"], _digits(figure)) if figure else "-"


def _digits(figure: Mapping[str, Any]) -> int:
    return 2 if abs(figure["value"] or 0.0) > 3 else 3


def _signed(row: Mapping[str, Any]) -> str:
    if row["difference"] is None:
        return "-"
    error = row["standard_error"]
    return f"{row['difference']:+.3g}" + ("" if error is None else f" \u00b1 {error:.2g}")


def _how(found: Mapping[str, Any]) -> Table:
    runs = [flat(found["run"]), *([flat(found["run_before"])] if found.get("run_before") else [])]
    names = ["after", "before"][: len(runs)] if len(runs) > 1 else ["model"]
    keys = list(dict.fromkeys(key for facts in runs for key in facts))
    return Table("How it was run", ["", *names], [[k, *(cell(facts.get(k)) for facts in runs)] for k in keys])


def _figures(rows: list[Mapping[str, Any]]) -> list[Figure]:
    """Draw shares of right answers before and after, with two standard errors and the chance level."""
    shares = [row for row in rows if row["chance"] is not None]
    if not shares:
        return []

    def paint(axes: Any) -> None:
        for place, row in enumerate(shares):
            for offset, name, colour in ((-0.14, "before", DENSE), (0.14, "after", SPARSE)):
                figure = row[name]
                axes.errorbar(
                    100 * figure["value"], place + offset, xerr=200 * (figure["standard_error"] or 0.0),
                    fmt="o", color=colour, markersize=5.5, capsize=2.5, label=name if place == 0 else None,
                )  # fmt: skip
            at = 100 * row["chance"]
            label = "chance" if place == 0 else None
            axes.plot([at, at], [place - 0.32, place + 0.32], color=PAGE_INK, linewidth=1.2, label=label)
        axes.set_yticks(range(len(shares)), [row["name"] for row in shares])
        axes.set_ylim(len(shares) - 0.4, -0.6)
        axes.set_xlabel("score, %; bars: 2 s.e.")
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0), fontsize=9)

    title = "Before and after"
    described = f"Scores of {', '.join(row['name'] for row in shares)}, before and after, and chance."
    svg = draw(WIDTH, 1.1 + 0.42 * len(shares), paint, title, described)
    return [Figure(title, svg, "A line marks what guessing scores.")]


def summary(found: Mapping[str, Any]) -> str:
    """Return the perplexity that an evaluation has, for the overview."""
    rows = (found.get("text") or {}).get("rows") or []
    return number(rows[0]["after"]["value"]) if rows else "-"
