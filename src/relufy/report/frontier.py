"""The plot of a search under a budget: what each candidate saves, and what it costs in quality."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relufy.files import replacing
from relufy.methods.auto import Search
from relufy.methods.budget.frontier import Point
from relufy.plot_style import INK, plot_style
from relufy.plot_style import SPARSE as AUTOMATIC

COLOURS = ("#4a7fc1", "#d9b45a", "#b3577a", "#7a6bb8", "#5aa6b0", "#c0744a", "#8a9a4b", "#6f7b8d", "#a58a7a")
ABOVE = 2.0
"""Points that cost more than so many budgets are left out."""


def plot_frontier(search: Search, output: Path) -> None:
    """Draw a search's points, bytes saved over the rise of the perplexity, as the path's suffix says.

    Filled points were accepted, the whisker reaches up to the bound, the ring is the chosen one.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(plot_style()), replacing(output) as temporary:  # type: ignore[arg-type]
        figure, axes = plt.subplots(figsize=(8.6, 4.8), layout="constrained")
        _paint(axes, search)
        figure.savefig(temporary, format=output.suffix.removeprefix("."), dpi=160)
        plt.close(figure)


def _paint(axes: Any, search: Search) -> None:
    budget = search.recipe.sparsify.budget
    limit = math.log1p(budget)
    shown = [p for p in search.frontier if p.bound <= ABOVE * limit]
    for method, colour in _colours(shown).items():
        _points(axes, method, [p for p in shown if p.method == method], colour)
    chosen = search.report.chosen
    axes.plot(
        [100 * chosen.bytes_saved], [_percent(chosen.nats)], "o", ms=13, mfc="none", mec=INK, label="chosen"
    )
    axes.axhline(100 * budget, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.annotate(
        f"budget {100 * budget:g} %", (1, 100 * budget), (-4, 4), ("axes fraction", "data"),
        textcoords="offset points", ha="right",
    )  # fmt: skip
    axes.set_xlabel("bytes of a token saved, %")
    axes.set_ylabel("rise of perplexity on the selection text, %\n(whiskers: one-sided 95 % bound)")
    axes.grid(axis="y")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)


def _points(axes: Any, method: str, points: Sequence[Point], colour: str) -> None:
    for point in points:
        middle, end = _percent(point.nats), _percent(point.bound)
        x = 100 * point.bytes_saved
        axes.plot([x, x], [middle, end], color=colour, linewidth=0.9, alpha=0.6)
        axes.plot([x], [middle], "o", ms=5, mec=colour, mfc=colour if point.is_accepted else "white")
    axes.plot([], [], "o", ms=5, color=colour, label=method)


def _colours(points: Sequence[Point]) -> dict[str, str]:
    """The automatic one's variants share a colour family, the others have one each."""
    methods = list(dict.fromkeys(point.method for point in points))
    greens = iter((AUTOMATIC, "#0d6b4f", "#6fd0b2", "#2f8f3f", "#a5d6a0"))
    others = iter(COLOURS * 2)
    return {method: next(greens if method.startswith("auto") else others) for method in methods}


def _percent(nats: float) -> float:
    return 100 * math.expm1(nats)
