"""The plot of `relufy compare`: perplexity over what is not read, and over the bytes that are."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from relufy.files import replacing
from relufy.plot_style import DENSE, INK, MARKERS, plot_style
from relufy.plot_style import SERIES as COLOURS

CONTROL_STYLES = {"random": (0, (1, 2)), "oracle": (0, (5, 2))}
NUM_ENTRIES = 8
"""The most that a row of the legend holds."""
MOST_TIMES_DENSE = 4.0
"""Perplexities beyond so many times dense are written at the upper edge."""

Document = Mapping[str, Any]
Row = Mapping[str, Any]
Axis = Callable[[Row], float | None]


def plot_comparison(document: Document, output: Path) -> None:
    """Draw what Comparison.to_json returned, atomically, in the format of the path's suffix (svg, png)."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    has_bytes = document["dense"]["bytes_engine"] is not None
    with plt.rc_context(plot_style()), replacing(output) as temporary:  # type: ignore[arg-type]
        width = 10.4 if has_bytes else 6.2
        figure, panels = plt.subplots(
            1, 1 + has_bytes, figsize=(width, 4.6), layout="constrained", squeeze=False, sharey=True
        )
        _paint(panels[0, 0], document, _unread, "weights not read, % of the blocks' (model_level_sparsity)")
        if has_bytes:
            dtype = document["settings"]["dtype"]
            _paint(panels[0, 1], document, _megabytes, f"MB read for a token (bytes_engine, {dtype})")
            panels[0, 1].invert_xaxis()
        panels[0, 0].set_ylabel("perplexity")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        ncols = len(handles) if len(handles) <= NUM_ENTRIES else -(-len(handles) // 2)
        figure.legend(
            handles, labels, loc="outside upper left", ncols=ncols, handlelength=2.2, columnspacing=1.4
        )
        kind = output.suffix.removeprefix(".")
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(temporary, format=kind, dpi=160, metadata=metadata)
        plt.close(figure)


def comparison_svg(document: Document, panel: str, title: str) -> str:
    """Return one panel as inline SVG for a page: "unread" or "bytes"."""
    from relufy.report.svg import PAGE_INK, draw

    place, label = {
        "unread": (_unread, "weights not read, % of the blocks' (model_level_sparsity)"),
        "bytes": (_megabytes, f"MB read for a token (bytes_engine, {document['settings']['dtype']})"),
    }[panel]

    def paint(axes: Any) -> None:
        _paint(axes, document, place, label, PAGE_INK, "none")
        if panel == "bytes":
            axes.invert_xaxis()
        axes.set_ylabel("perplexity")
        axes.legend(
            ncols=2, loc="lower left", bbox_to_anchor=(0, 1.0), fontsize=9, handlelength=1.8,
            columnspacing=1.2, labelspacing=0.3, borderaxespad=0.2,
        )  # fmt: skip

    names = ", ".join(dict.fromkeys(row["method"] for row in document["rows"]))
    return draw(4.7, 3.9, paint, title, f"Lines: dense, {names}. Horizontal: {label}. Vertical: perplexity.")


def _unread(found: Row) -> float | None:
    return 100 * found["model_level_sparsity"]


def _megabytes(found: Row) -> float | None:
    return found["bytes_engine"]["sparse"] / 1e6 if found["bytes_engine"] else None


def _paint(
    axes: Any, document: Document, place: Axis, label: str, ink: str = INK, face: str = "white"
) -> None:
    dense = document["dense"]["perplexity"]["perplexity"]
    top = dense * _height(document, dense)
    axes.axhline(dense, color=DENSE, linewidth=1.2, label=f"dense {dense:.2f}", zorder=1)
    found = [row for row in document["rows"] if "perplexity" in row and place(row) is not None]
    for index, method in enumerate(dict.fromkeys(row["method"] for row in found)):
        rows = sorted((row for row in found if row["method"] == method), key=lambda row: place(row) or 0.0)
        _paint_method(axes, index, rows, [place(row) for row in rows], top, face)
    if any(row["controls"] for row in found):
        for control, style in CONTROL_STYLES.items():
            name = f"{control} masks{_beyond(found, control, top)}"
            axes.plot([], [], color=ink, linestyle=style, linewidth=1.0, alpha=0.6, label=name)
    _scale(axes, dense, top)
    axes.set_xlabel(label)
    axes.grid(axis="y")


def _paint_method(
    axes: Any, index: int, rows: Sequence[Row], xs: Sequence[Any], top: float, face: str
) -> None:
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    for control, style in CONTROL_STYLES.items():
        values = [_control(row, control) for row in rows]
        axes.plot(xs, values, color=colour, linestyle=style, linewidth=1.0, alpha=0.45, zorder=2)
    own = [_number(row["perplexity"]["perplexity"]) for row in rows]
    name = rows[0]["method"]
    axes.plot(xs, own, color=colour, marker=marker, markersize=5, linewidth=1.8, label=name, zorder=3)
    _write_beyond(axes, xs, own, top, colour, face)


def _scale(axes: Any, dense: float, top: float) -> None:
    """Make a logarithmic axis with ticks at round numbers."""
    from matplotlib import ticker

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.FixedLocator(_round_numbers(dense, top)))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.set_ylim(dense * (dense / top) ** 0.04, top)


def _round_numbers(low: float, high: float) -> list[float]:
    """Return three to twelve round numbers of about equal ratios between two."""
    from matplotlib.ticker import MaxNLocator

    if high / low < 1.5:
        return [tick for tick in MaxNLocator(6).tick_values(low, high) if low <= tick <= high]
    steps = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    values = [step * 10.0**power for power in range(-1, 8) for step in steps]
    return [value for value in values if low <= value <= high]


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _control(row: Row, control: str) -> float:
    return _number(row["controls"].get(control, {}).get("perplexity", {}).get("perplexity"))


def _beyond(rows: Sequence[Row], control: str, top: float) -> str:
    """Say so if all of a control's perplexities are beyond the upper edge."""
    least = min((value for row in rows if (value := _control(row, control)) > 0), default=top)
    return f" ({least:.0f} or more)" if least > top else ""


def _height(document: Document, dense: float) -> float:
    """Return the upper edge, in times dense: what holds the methods, but no more than is legible."""
    found = [row["perplexity"]["perplexity"] for row in document["rows"] if "perplexity" in row]
    greatest = max((value for value in found if value is not None), default=dense)
    return max(1.02, min(1.05 * greatest / dense, MOST_TIMES_DENSE))


def _write_beyond(
    axes: Any, xs: Sequence[Any], values: Sequence[float], top: float, colour: str, face: str
) -> None:
    """Write what is beyond the upper edge, or no number, below it; each method on a line of its own."""
    line = len({text.get_color() for text in axes.texts})
    box = {"facecolor": face, "edgecolor": "none", "pad": 0.8}
    style = {"color": colour, "fontsize": 8, "ha": "center", "va": "top", "bbox": box}
    for x, value in zip(xs, values, strict=True):
        if not value <= top:
            text = "NaN" if value != value else f"{value:.3g}"
            axes.annotate(text, (x, top), (0, -4 - 12 * line), textcoords="offset points", **style)
