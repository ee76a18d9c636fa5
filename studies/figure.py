"""The figure of a study: two plots side by side in the project's style."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INKS = ("#7a7a7a", "#1f77b4", "#2a9d5c", "#d1495b", "#8e44ad", "#b8860b", "#8b1e3f")


@contextmanager
def figure(file: Path, num_plots: int = 2) -> Iterator[Any]:
    """Give axes to draw in, and write the figure when this context ends."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    from relufy.plot_style import plot_style

    with pyplot.rc_context(plot_style("#222222")):
        drawn, axes = pyplot.subplots(1, num_plots, figsize=(5.25 * num_plots, 4))
        yield axes
        for plot in axes if num_plots > 1 else (axes,):
            plot.grid(axis="y")
        drawn.tight_layout()
        drawn.savefig(file, dpi=140)
        pyplot.close(drawn)
