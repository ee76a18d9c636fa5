"""The log of a training: losses, zeros and what else it reported, over its steps."""

from collections import defaultdict
from typing import Any

from relufy.report.content import Figure, Section, Table
from relufy.report.lines import Curve, curves
from relufy.report.run import Run
from relufy.train.logbook import scalars

SHARES = ("sparsity", "live_sparsity", "dead", "union_density", "zeros")
LOSSES = ("loss", "cross_entropy", "eval_loss", "distill", "kl", "penalty")


def section(run: Run) -> Section:
    """Return the section of a training's log."""
    series: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for report in run.document["reports"]:
        for name, value in scalars(report):
            if "/layer_" not in name and isinstance(value, int | float):
                series[name].append((report["step"], float(value)))
    if not series:
        raise KeyError("a number beside 'step'")
    last = max(step for points in series.values() for step, _ in points)
    return Section(
        title=f"Training: {run.path.parent.name or run.name}",
        lead=f"{len(run.document['reports']):,} reports up to step {last:,}.",
        tables=[_table(series)],
        figures=_figures(series),
        definitions={
            "sparsity": "share of exact zeros at a site in the training text, a mean over layers",
            "dead": "share of neurons that were active at none of the last dead_positions",
            "union_density": "share of neurons that are active at any of 8 consecutive tokens",
        },
    )


def _table(series: dict[str, list[tuple[int, float]]]) -> Table:
    rows = [
        [
            name,
            f"{points[0][1]:.5g}",
            f"{points[-1][1]:.5g}",
            f"{min(v for _, v in points):.5g}",
            str(len(points)),
        ]
        for name, points in series.items()
    ]
    return Table("What was reported", ["", "first", "last", "least", "reports"], rows)


def _figures(series: dict[str, list[tuple[int, float]]]) -> list[Figure]:
    shares = {n: p for n, p in series.items() if n.partition("/")[0] in SHARES and len(p) > 1}
    losses = {n: p for n, p in series.items() if _is_loss(n) and len(p) > 1}
    rates = {n: p for n, p in series.items() if "learning_rate" in n and len(p) > 1}
    drawn = []
    if losses:
        caption = "On the batches that were trained on, unless a name says else."
        drawn.append(_over_steps("Losses", losses, "nats a token", caption))
    if shares:
        drawn.append(_over_steps("Zeros while training", shares, "share", "Means over layers.", percent=True))
    if rates:
        drawn.append(_over_steps("Learning rate", rates, "learning rate", ""))
    return drawn


def _is_loss(name: str) -> bool:
    return name.partition("/")[0] in LOSSES or name.endswith("loss")


def _over_steps(title: str, found: dict[str, Any], y: str, caption: str, percent: bool = False) -> Figure:
    lines = [Curve(name, [s for s, _ in points], [v for _, v in points]) for name, points in found.items()]
    return curves(title, lines[:8], "step", y, caption, percent=percent)
