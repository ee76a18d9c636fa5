"""The plot of `relufy compare`: perplexity over what is not read, and over the bytes that are."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from relufy.files import replacing
from relufy.plot_style import plot_style

INK = "#1d2430"
DENSE = "#8b95a5"
COLOURS = ("#2e5fd0", "#1aa179", "#e0803a", "#8a6fc9", "#c8447b", "#5aaec4", "#a8862b", "#4a5568")
MARKERS = "osD^vPX*"
CONTROL_STYLES = {"random": (0, (1, 2)), "oracle": (0, (5, 2))}
NUM_ENTRIES = 8
"""The most that a row of the legend holds."""
MOST_TIMES_DENSE = 4.0
"""Perplexities beyond so many times dense are drawn at the upper edge, as arrows."""

Document = Mapping[str, Any]
Axis = Callable[[Mapping[str, Any]], float | None]


def plot_comparison(document: Document, output: Path) -> None:
    """Draw what Comparison.to_json returned, atomically, in the format of the path's suffix (svg, png)."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    has_bytes = document["dense"]["bytes_engine"] is not None
    with plt.rc_context(plot_style(INK)), replacing(output) as temporary:  # type: ignore[arg-type]
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


def _unread(found: Mapping[str, Any]) -> float | None:
    return 100 * found["model_level_sparsity"]


def _megabytes(found: Mapping[str, Any]) -> float | None:
    return found["bytes_engine"]["sparse"] / 1e6 if found["bytes_engine"] else None


def _paint(axes: Any, document: Document, place: Axis, label: str) -> None:
    dense = document["dense"]["perplexity"]["perplexity"]
    top = dense * _height(document, dense)
    axes.axhline(dense, color=DENSE, linewidth=1.2, label=f"dense {dense:.2f}", zorder=1)
    methods = list(dict.fromkeys(row["method"] for row in document["rows"] if "perplexity" in row))
    for index, method in enumerate(methods):
        rows = [r for r in document["rows"] if r["method"] == method and "perplexity" in r and place(r)]
        rows.sort(key=lambda row: place(row) or 0)
        colour = COLOURS[index % len(COLOURS)]
        xs = [place(row) for row in rows]
        for control, style in CONTROL_STYLES.items():
            values = [
                row["controls"].get(control, {}).get("perplexity", {}).get("perplexity") for row in rows
            ]
            _line(axes, xs, values, top, color=colour, linestyle=style, linewidth=1.0, alpha=0.45, zorder=2)
        own = [row["perplexity"]["perplexity"] for row in rows]
        marker = MARKERS[index % len(MARKERS)]
        _line(
            axes,
            xs,
            own,
            top,
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.8,
            label=method,
            zorder=3,
        )
        _arrows(axes, xs, own, top, colour)
    if any(row.get("controls") for row in document["rows"]):
        for control, style in CONTROL_STYLES.items():
            label_of = f"{control} masks{_beyond(document, control, top)}"
            axes.plot([], [], color=INK, linestyle=style, linewidth=1.0, alpha=0.6, label=label_of)
    axes.set_ylim(dense - 0.04 * (top - dense), top)
    axes.set_xlabel(label)
    axes.grid(axis="y")


def _beyond(document: Document, control: str, top: float) -> str:
    """Say so if all of a control's perplexities are beyond the upper edge."""
    found = [
        row["controls"][control]["perplexity"]["perplexity"]
        for row in document["rows"]
        if row.get("controls")
    ]
    least = min((value for value in found if value is not None), default=top)
    return f" ({least:.0f} or more)" if least > top else ""


def _height(document: Document, dense: float) -> float:
    """Return the upper edge, in times dense: what holds the methods, but no more than is legible."""
    found = [row["perplexity"]["perplexity"] for row in document["rows"] if "perplexity" in row]
    greatest = max((value for value in found if value is not None), default=dense)
    return max(1.02, min(1.05 * greatest / dense, MOST_TIMES_DENSE))


def _line(axes: Any, xs: Sequence[Any], values: Sequence[float | None], top: float, **style: Any) -> None:
    """Draw a line; what has no value, or is far beyond the edge, ends at a gap or leaves the panel."""
    shown = [float("nan") if value is None else min(value, 50 * top) for value in values]
    axes.plot(xs, shown, **style)


def _arrows(axes: Any, xs: Sequence[Any], values: Sequence[float | None], top: float, colour: str) -> None:
    for x, value in zip(xs, values, strict=True):
        if value is None or value > top:
            text = "NaN" if value is None else f"{value:.3g}"
            axes.annotate(
                text, (x, top), (0, -4), textcoords="offset points", color=colour, ha="center", va="top",
                fontsize=8, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
            )  # fmt: skip
