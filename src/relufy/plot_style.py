"""How every plot of relufy looks: thin lines, no box, text as text, and one set of colours."""

from typing import Any

INK = "#1d2430"
DENSE = "#8b95a5"
SPARSE = "#1aa179"
SERIES = ("#2e5fd0", "#1aa179", "#e0803a", "#8a6fc9", "#c8447b", "#5aaec4", "#a8862b", "#6f7b8d")
"""Lines and points, in order; legible on white and on black."""
MARKERS = "osD^vPX*"
CELLS = ("#4f7bd918", "#2e5fd0")
"""From no zeros to all, with nothing behind."""


def plot_style(ink: str = INK) -> dict[str, Any]:
    """Return matplotlib's settings for lines and text of a colour."""
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "relufy",
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "grid.color": ink,
        "grid.alpha": 0.12,
        "legend.frameon": False,
    }
