"""Plots of benchmarks: bars of tokens per second, or lines over the number of sequences."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relufy.errors import UserError
from relufy.files import replacing
from relufy.plot_style import DENSE as DENSE_COLOUR
from relufy.plot_style import INK, SERIES, plot_style
from relufy.plot_style import SPARSE as SPARSE_COLOUR

FORMATS = ("svg", "png", "pdf")
SPARSE, DENSE = "relufy, sparse", "relufy, own dense"
STYLE = plot_style() | {"axes.spines.left": False, "ytick.major.size": 0}
SPEEDS = ("tokens_per_second", "dense_tokens_per_second", "llama_cpp_tokens_per_second_by_type")
DRAWN = {
    "decode": ("label", *SPEEDS, "bound_vs_dense"),
    "prefill": ("label", *SPEEDS),
    "batch": ("label", "by_batch"),
}
"""The benchmarks that can be drawn, and the keys of a result that a plot needs."""
ROW_INCHES, GAP_ROWS, PANEL_INCHES = 0.3, 1.0, 3.4

Result = Mapping[str, Any]


def read_results(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Read what `relufy bench ... --json` wrote. Raises UserError for a file of anything else."""
    results = []
    for file in files:
        try:
            result = json.loads(file.read_text())
            if not all(key in result for key in DRAWN[result["benchmark"]]):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            kinds = ", ".join(DRAWN)
            raise UserError(f"{file} is not a result of `relufy bench {kinds}` with --json") from None
        results.append(result)
    if len({result["benchmark"] == "batch" for result in results}) > 1:
        raise UserError("batches and single sequences don't go into one plot; draw them apart")
    return results


def check_plot_path(output: Path) -> None:
    """Raise UserError if a plot can't be written in the format that the path asks for."""
    if output.suffix.removeprefix(".") not in FORMATS:
        raise UserError(f"--plot writes .{', .'.join(FORMATS)}, not {output.name}")


def plot_results(results: Sequence[Result], output: Path) -> None:
    """Draw results of one kind and write them as the path's suffix says, atomically.

    Decode and prefill get a group of bars each, batches a panel each.
    """
    check_plot_path(output)
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE), replacing(output) as temporary:  # type: ignore[arg-type]
        draw = _draw_batches if results[0]["benchmark"] == "batch" else _draw_bars
        figure = draw(plt, results)
        figure.savefig(temporary, format=output.suffix.removeprefix("."), dpi=160)
        plt.close(figure)


def contender_speeds(found: Result) -> dict[str, float]:
    """Return the tokens per second of a result's contenders, or of those at one number of sequences."""
    others = found["llama_cpp_tokens_per_second_by_type"].items()
    return {
        **{f"llama.cpp {kind}": speed for kind, speed in others},
        DENSE: found["dense_tokens_per_second"],
        SPARSE: found["tokens_per_second"],
    }


def _colour(name: str) -> str:
    return {SPARSE: SPARSE_COLOUR, DENSE: DENSE_COLOUR, "llama.cpp Q4_K_M": SERIES[6]}.get(name, SERIES[5])


def _draw_bars(plt: Any, results: Sequence[Result]) -> Any:
    groups = [contender_speeds(result) for result in results]
    height = 1.0 + ROW_INCHES * sum(len(bars) + GAP_ROWS for bars in groups)
    figure, axes = plt.subplots(figsize=(8.6, height), layout="constrained")
    place, ticks = 0.0, []
    for result, bars in zip(results, groups, strict=True):
        axes.text(0, place, f"{result['benchmark']}: {result['label']}", weight="bold", va="center")
        ticks += [(place + 1 + row, name) for row, name in enumerate(bars)]
        place = _paint_group(axes, result, bars, place) + GAP_ROWS
    axes.set_yticks(*zip(*ticks, strict=True))
    axes.set_xlim(0, 1.4 * axes.dataLim.x1)
    has_bounds = any("bound_vs_dense" in result for result in results)
    lines = "; lines mark the bound by the bytes that are read" if has_bounds else ""
    axes.set_xlabel(f"tokens/s, median of interleaved turns{lines}")
    axes.invert_yaxis()
    return figure


def _paint_group(axes: Any, result: Result, bars: Mapping[str, float], place: float) -> float:
    """Draw the bars below a place, with the bound on the last where there is one; return the last's place."""
    dense = result["dense_tokens_per_second"]
    bound = dense * result["bound_vs_dense"] if "bound_vs_dense" in result else 0.0
    for name, speed in bars.items():
        place += 1
        axes.barh(place, speed, color=_colour(name), height=0.72)
        end = max(speed, bound) if name == SPARSE else speed
        text = f"{speed:.1f}   {speed / dense:.2f}x own dense"
        axes.annotate(text, (end, place), (7, 0), textcoords="offset points", va="center")
    if bound:
        axes.plot([bound, bound], [place - 0.45, place + 0.45], color=INK, linewidth=1.4)
    return place


def _draw_batches(plt: Any, results: Sequence[Result]) -> Any:
    size = (8.6, PANEL_INCHES * len(results))
    figure, panels = plt.subplots(len(results), figsize=size, layout="constrained", squeeze=False)
    for result, axes in zip(results, panels[:, 0], strict=True):
        sizes = list(result["by_batch"])
        lines: dict[str, list[float]] = {}
        for size in sizes:
            for name, speed in contender_speeds(result["by_batch"][size]).items():
                lines.setdefault(name, []).append(speed)
        for name, speeds in lines.items():
            axes.plot(range(len(sizes)), speeds, "o-", color=_colour(name), label=name, linewidth=1.8)
        axes.set_xticks(range(len(sizes)), sizes)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.set_title(result["label"], loc="left", weight="bold", fontsize=10)
        axes.set_xlabel("sequences")
        axes.set_ylabel("tokens/s, of all of them")
        axes.legend()
    return figure
