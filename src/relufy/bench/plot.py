"""The plot of decode benchmarks: tokens per second of every contender, with the bound by bytes marked."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relufy.errors import UserError
from relufy.files import replacing

FORMATS = ("svg", "png", "pdf")
INK, SPARSE_COLOUR, DENSE_COLOUR, OTHER_COLOUR = "#1d2430", "#1aa179", "#6f7b8d", "#b9c1cc"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "relufy",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.size": 0,
    "legend.frameon": False,
}
DRAWN = (
    "label",
    "tokens_per_second",
    "dense_tokens_per_second",
    "llama_cpp_tokens_per_second_by_type",
    "bound_vs_dense",
)
"""The keys of a result that a plot needs."""
ROW_INCHES, GAP_ROWS = 0.3, 1.0


def read_results(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Read what `relufy bench decode --json` wrote. Raises UserError for a file of anything else."""
    results = []
    for file in files:
        try:
            result = json.loads(file.read_text())
            if result["benchmark"] != "decode" or not all(key in result for key in DRAWN):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file} is not a result of `relufy bench decode --json`") from None
        results.append(result)
    return results


def check_plot_path(output: Path) -> None:
    """Raise UserError if a plot can't be written in the format that the path asks for."""
    if output.suffix.removeprefix(".") not in FORMATS:
        raise UserError(f"--plot writes .{', .'.join(FORMATS)}, not {output.name}")


def plot_decode(results: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Draw one group of bars a result and write it as the path's suffix says, atomically."""
    check_plot_path(output)
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = [_bars(result) for result in results]
    height = 1.0 + ROW_INCHES * sum(len(bars) + GAP_ROWS for bars in rows)
    with plt.rc_context(STYLE), replacing(output) as temporary:  # type: ignore[arg-type]
        figure, axes = plt.subplots(figsize=(8.6, height), layout="constrained")
        _paint(axes, results, rows)
        figure.savefig(temporary, format=output.suffix.removeprefix("."), dpi=160)
        plt.close(figure)


def _bars(result: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """Return name, tokens per second and colour of a result's contenders, the slowest baseline first."""
    others = sorted(result["llama_cpp_tokens_per_second_by_type"].items(), key=lambda item: item[1])
    return [
        *((f"llama.cpp {kind}", speed, OTHER_COLOUR) for kind, speed in others),
        ("relufy, own dense", result["dense_tokens_per_second"], DENSE_COLOUR),
        ("relufy, sparse", result["tokens_per_second"], SPARSE_COLOUR),
    ]


def _paint(axes: Any, results: Sequence[Mapping[str, Any]], groups: Sequence[Any]) -> None:
    place, ticks = 0.0, []
    for result, bars in zip(results, groups, strict=True):
        bound = result["dense_tokens_per_second"] * result["bound_vs_dense"]
        axes.text(0, place, result["label"], weight="bold", va="center")
        for name, speed, colour in bars:
            place += 1
            ticks.append((place, name))
            axes.barh(place, speed, color=colour, height=0.72)
            ratio = speed / result["dense_tokens_per_second"]
            end = max(speed, bound) if colour == SPARSE_COLOUR else speed
            text = f"{speed:.1f}   {ratio:.2f}x own dense"
            axes.annotate(text, (end, place), (7, 0), textcoords="offset points", va="center")
        axes.plot([bound, bound], [place - 0.45, place + 0.45], color=INK, linewidth=1.4)
        place += GAP_ROWS
    axes.set_yticks(*zip(*ticks, strict=True))
    axes.set_xlim(0, 1.4 * axes.dataLim.x1)
    axes.set_xlabel(
        "tokens/s, median of interleaved turns; the line marks the bound by the bytes that are read"
    )
    axes.invert_yaxis()
