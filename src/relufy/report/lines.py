"""The kinds of plots that several sections draw: curves, a heatmap of layers and sites, histograms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.colors import LinearSegmentedColormap

from relufy.plot_style import CELLS, DENSE, SERIES
from relufy.report.content import Figure
from relufy.report.svg import PAGE_INK, draw

WIDTH = 4.7
HEIGHT = 2.9
CELL_COLOURS = LinearSegmentedColormap.from_list("zeros", list(CELLS))
MOST_CELLS = 16
"""Layers up to which the cells of a heatmap show their number."""


@dataclass(frozen=True)
class Curve:
    """A line of a plot: dashes say what kind it is where colours say whose."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    colour: str = ""
    dashes: Any = "-"
    marker: str = ""
    errors: Sequence[float | None] = ()


def curves(
    title: str,
    lines: Sequence[Curve],
    x: str,
    y: str,
    caption: str = "",
    log_x: bool = False,
    log_y: bool = False,
    percent: bool = False,
    level: tuple[str, float] | None = None,
) -> Figure:
    """Draw lines over one axis. `percent` is for shares; `level` is a line across, with its name."""

    def paint(axes: Any) -> None:
        if level is not None:
            axes.axhline(level[1], color=DENSE, linewidth=1.2, label=level[0], zorder=1)
        for index, line in enumerate(lines):
            _line(axes, line, line.colour or SERIES[index % len(SERIES)])
        if log_x:
            _doubling(axes, sorted({value for line in lines for value in line.xs}))
        if log_y:
            axes.set_yscale("log")
        if percent:
            axes.yaxis.set_major_formatter(lambda value, _place: f"{100 * value:.3g} %")
            _from_zero(axes, [value for line in lines for value in line.ys if value is not None])
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(axis="y")
        _legend(axes, len(lines) + (level is not None))

    names = ", ".join(line.name for line in lines)
    height = HEIGHT + 0.2 * ((len(lines) + 1) // 2)
    described = f"Lines: {names}. Horizontal: {x}. Vertical: {y}. {caption}"
    return Figure(title, draw(WIDTH, height, paint, title, described), caption)


def _line(axes: Any, line: Curve, colour: str) -> None:
    nan = float("nan")
    ys = [nan if value is None else value for value in line.ys]
    axes.plot(
        line.xs, ys, color=colour, linestyle=line.dashes, marker=line.marker, markersize=4.5, linewidth=1.7,
        label=line.name, zorder=3,
    )  # fmt: skip
    if line.errors:
        errors = [nan if value is None else value for value in line.errors]
        low, high = ([v + sign * e for v, e in zip(ys, errors, strict=True)] for sign in (-2, 2))
        axes.fill_between(line.xs, low, high, color=colour, alpha=0.15, linewidth=0)


def _from_zero(axes: Any, values: Sequence[float]) -> None:
    """Let the axis of shares begin at 0, and end above it where all are 0."""
    if values and min(values) >= 0:
        axes.set_ylim(bottom=-0.03 * (max(values) or 1.0), top=None if max(values) else 1.0)


def _doubling(axes: Any, values: Sequence[float]) -> None:
    """Make a logarithmic axis with a tick at each power of two among the values, or at all of a few."""
    from matplotlib import ticker

    axes.set_xscale("log", base=2)
    chosen = [v for v in values if v >= 1 and float(v).is_integer() and (int(v) & (int(v) - 1)) == 0]
    axes.xaxis.set_major_locator(ticker.FixedLocator(chosen or list(values)))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())


def _legend(axes: Any, entries: int) -> None:
    """Put the legend above the plot, where it covers nothing."""
    if entries > 1:
        axes.legend(
            ncols=2, loc="lower left", bbox_to_anchor=(0, 1.0), fontsize=9, handlelength=1.8,
            columnspacing=1.2, labelspacing=0.3, borderaxespad=0.2,
        )  # fmt: skip


def heatmap(title: str, rows: Mapping[str, Sequence[float]], caption: str = "") -> Figure:
    """Draw shares by row and layer, `rows[name][layer]`, dark where there is more."""
    grid = [list(values) for values in rows.values()]
    layers = len(grid[0])

    def paint(axes: Any) -> None:
        axes.pcolormesh(grid, cmap=CELL_COLOURS, vmin=0, vmax=1, edgecolor=PAGE_INK + "00", linewidth=2)
        for row, shares in enumerate(grid):
            for layer, value in enumerate(shares if layers <= MOST_CELLS else ()):
                colour = "white" if value > 0.45 else PAGE_INK
                axes.text(
                    layer + 0.5,
                    row + 0.5,
                    f"{100 * value:.0f}",
                    ha="center",
                    va="center",
                    color=colour,
                    size=9,
                )
        axes.set_yticks([row + 0.5 for row in range(len(grid))], list(rows))
        ticks = range(0, layers, max(1, layers // 12))
        axes.set_xticks([layer + 0.5 for layer in ticks], [str(layer) for layer in ticks])
        axes.set_xlabel("layer" + ("; cells: percent" if layers <= MOST_CELLS else ""))
        axes.invert_yaxis()
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)

    is_wide = layers > 10
    width = WIDTH if not is_wide else min(10.0, 1.2 + 0.36 * min(layers, 26))
    described = f"Rows: {', '.join(rows)}. Columns: {layers} layers. {caption}"
    return Figure(title, draw(width, 0.8 + 0.36 * len(grid), paint, title, described), caption, is_wide)


def by_layer(
    title: str, lines: Mapping[str, Sequence[float | None]], y: str, caption: str = "", percent: bool = True
) -> Figure:
    """Draw values of each layer, a line of points for each name."""
    drawn = [Curve(n, list(range(len(v))), list(v), marker="o") for n, v in lines.items()]
    return curves(title, drawn, "layer", y, caption, percent=percent)
