"""The plot of `relufy measure reuse`: what each period costs in perplexity, and what it gains."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relufy.files import replacing
from relufy.plot_style import plot_style

INK = "#1d2430"
COLOURS = {"window": "#1aa179", "adaptive": "#0d6b4f", "blocks": "#4a7fc1", "prompt": "#d9b45a"}
RANDOM = "#9aa3ad"
GAINS = (
    ("speedup_vs_exact", "tokens/s, x the exact mode", lambda row: row["speedup_vs_exact"]),
    ("bytes_vs_exact", "bytes of the exact mode's token / own", lambda row: 1 / row["bytes_vs_exact"]),
)


def plot_reuse(found: Mapping[str, Any], output: Path) -> None:
    """Draw a document's two curves over the period, perplexity and speed (bytes, where speed was not
    measured), as the path's suffix says."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(plot_style(INK)), replacing(output) as temporary:  # type: ignore[arg-type]
        figure, (quality, gain) = plt.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained")
        for name, rows in _lines(found).items():
            _paint(quality, gain, name, rows)
        _dress(quality, "change of perplexity, %", 0.0)
        _dress(gain, _gain(found["settings"])[1], 1.0)
        gain.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
        figure.savefig(temporary, format=output.suffix.removeprefix("."), dpi=160)
        plt.close(figure)


def _paint(quality: Any, gain: Any, name: str, rows: list[Mapping[str, Any]]) -> None:
    periods = [row["reuse"]["period"] for row in rows]
    changes = [row["perplexity_change_percent"] for row in rows]
    errors = [row["standard_error_percent"] or 0.0 for row in rows]
    style = {"color": COLOURS.get(name, RANDOM), "marker": "o", "ms": 4, "lw": 1.2}
    quality.errorbar(periods, changes, yerr=errors, capsize=2, **style)
    gain.plot(periods, [_gain(rows)[2](row) for row in rows], label=name, **style)


def _lines(found: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in found["settings"]:
        name = "random sets" if row["reuse"]["is_control"] else row["reuse"]["policy"]
        lines.setdefault(name, []).append(row)
    return lines


def _gain(rows: list[Mapping[str, Any]]) -> Any:
    is_timed = all(row["speedup_vs_exact"] is not None for row in rows)
    return GAINS[0 if is_timed else 1]


def _dress(axes: Any, label: str, base: float) -> None:
    axes.axhline(base, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("period, tokens")
    axes.set_ylabel(label)
    axes.grid(axis="y")
