"""`relufy doctor`: findings with their figures, what to expect, and what to run next."""

from collections.abc import Mapping
from typing import Any

from relufy.plot_style import DENSE, SERIES
from relufy.report.content import Figure, Section, Table, share
from relufy.report.lines import Curve, by_layer, curves
from relufy.report.run import Run

SIGNS = {"good": "ok", "watch": "watch", "bad": "limits", "unchecked": "unchecked"}


def section(run: Run) -> Section:
    """Return the section of a diagnosis."""
    found = run.document
    by_check = {finding["check"]: finding for finding in found["findings"]}
    figures = [*_layers(by_check), *_sweep(by_check), *_generation(by_check), *_attention(by_check)]
    return Section(
        title=f"Doctor: {found['model']}",
        lead=f"{found['architecture']}, {found['activation']}; {found['windows']} windows of "
        f"{found['window']} tokens, perplexity {found['perplexity']:.2f}.",
        tables=[_findings(found), _expectations(found), _next(found)],
        figures=figures,
        notes=found.get("notes") or [],
        definitions=found["definitions"],
    )


def _findings(found: Mapping[str, Any]) -> Table:
    rows = [
        [finding["title"], SIGNS[finding["status"]], finding["verdict"], "\n".join(finding["advice"])]
        for finding in found["findings"]
    ]
    return Table("Findings", ["check", "", "verdict", "try"], rows)


def _expectations(found: Mapping[str, Any]) -> Table:
    rows = []
    for row in found["expectations"]:
        rise = "-" if row["perplexity_rise"] is None else f"{100 * row['perplexity_rise']:+.1f} %"
        shares = [share(row[name]) for name in ("neuron_zeros", "weights_unread", "bytes_saved")]
        rows.append([row["method"], *shares, rise, row["takes"], row["source"]])
    columns = ["method", "neuron zeros", "weights unread", "bytes saved", "perplexity", "takes", "source"]
    return Table("What to expect on this model", columns, rows)


def _next(found: Mapping[str, Any]) -> Table:
    rows = [[str(index), step] for index, step in enumerate(found["next_steps"], start=1)]
    return Table("What to run next", ["", "command"], rows)


def _layers(found: Mapping[str, Any]) -> list[Figure]:
    figures = (found.get("layers") or {}).get("figures") or {}
    if not figures:
        return []
    lines = {
        "one epsilon for all": figures["sparsity_at_universal_epsilon"],
        "an epsilon each": figures["sparsity_at_equal_cett"],
        "dead": figures["dead_share"],
    }
    caption = (
        f"Share of neurons that a layer can do without at an error (CETT) of {figures['cett_target']:g}."
    )
    return [by_layer("Balance of the layers", lines, "neurons", caption)]


def _sweep(found: Mapping[str, Any]) -> list[Figure]:
    figures = (found.get("sweep") or {}).get("figures") or {}
    if not figures:
        return []
    levels = figures["levels"]
    lines = [Curve("the least by |a| norm (oracle)", *_line(levels, figures["rise"]), marker="o")]
    if control := figures.get("control"):
        name = f"control {control['model']}"
        lines.append(Curve(name, *_line(levels, control["rise"]), SERIES[1], marker="s"))
    name = "drawn at random"
    lines.append(Curve(name, *_line(levels, figures["rise_of_random"]), DENSE, (0, (5, 2))))
    top = max(0.3, 1.3 * max(value for line in lines[:-1] for value in line.ys if value is not None))
    clipped = [
        Curve(c.name, c.xs, [_within(v, top) for v in c.ys], c.colour, c.dashes, c.marker) for c in lines
    ]
    caption = (
        f"Knee, 1 % of perplexity: {share(figures['knee'], 0)} of the neurons. Own zeros: "
        f"{share(figures['own_zeros'])}. What is beyond {share(top, 0)} is not drawn."
    )
    title = "Perplexity over neurons left out"
    return [curves(title, clipped, "neurons left out, %", "rise of perplexity", caption, percent=True)]


def _line(levels: list[float], rises: list[float | None]) -> tuple[list[float], list[float | None]]:
    return [0.0, *(100 * level for level in levels)], [0.0, *rises]


def _within(value: float | None, top: float) -> float | None:
    return None if value is None or value > top else value


def _generation(found: Mapping[str, Any]) -> list[Figure]:
    figures = (found.get("generation") or {}).get("figures") or {}
    if not figures:
        return []
    tokens = list(range(1, figures["new_tokens"] + 1))
    lines = [
        Curve("seen", tokens, figures["same_so_far"]),
        Curve("if slips were independent", tokens, figures["expected_same_so_far"], DENSE, (0, (5, 2))),
    ]
    caption = f"Compared: {figures['compared']}; {figures['prompts']} texts, greedy."
    title = "Texts that are still the same"
    return [curves(title, lines, "tokens written", "same so far", caption, percent=True)]


def _attention(found: Mapping[str, Any]) -> list[Figure]:
    figures = (found.get("first_tokens") or {}).get("figures") or {}
    if not figures.get("attention_on_first"):
        return []
    lines = {"attention on the first token": figures["attention_on_first"]}
    return [
        by_layer("Attention sinks", lines, "share of attention", "A mean over heads and later positions.")
    ]
