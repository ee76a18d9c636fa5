"""Pre-activations: their distribution in each layer, and the zeros that a shifted ReLU would make of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from relufy.plot_style import DENSE, SERIES
from relufy.report.content import Figure
from relufy.report.lines import WIDTH, Curve, curves
from relufy.report.svg import PAGE_INK, draw

MOST_LAYERS = 12
"""Layers that are drawn; of more, as many spread evenly."""
POINTS = 61
LAYERS = LinearSegmentedColormap.from_list("layers", [SERIES[0], SERIES[3], SERIES[2]])


def histograms(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the density of each layer's pre-activations, one above the other, the first layer on top."""
    chosen = _chosen(len(layers))
    low, high = _middle(layers)
    title = "Pre-activations by layer"

    def paint(axes: Any) -> None:
        for row, layer in enumerate(chosen):
            xs, ys = _density(layers[layer], low, high)
            base = len(chosen) - 1 - row
            top = base + 0.92 * ys / max(float(ys.max()), 1e-12)
            colour = _shade(row, len(chosen))
            axes.fill_between(xs, base, top, color=colour, alpha=0.55, linewidth=0, zorder=row + 2)
            axes.plot(xs, top, color=colour, linewidth=1.0, zorder=row + 2)
        axes.axvline(0.0, color=PAGE_INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=99)
        axes.set_yticks(range(len(chosen)), [str(layer) for layer in reversed(chosen)])
        axes.set_xlim(low, high)
        axes.set_xlabel("pre-activation z; a ReLU keeps what is right of 0")
        axes.set_ylabel("layer")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)

    caption = "Each layer's density, to its own height; the middle 99 % of all values."
    svg = draw(WIDTH, 1.0 + 0.34 * len(chosen), paint, title, caption)
    return Figure(title, svg, caption)


def predicted_curve(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the sparsity that relu(z - shift) has, over the shift: the mean over layers, and each layer."""
    low, high = _middle(layers)
    shifts = np.linspace(min(0.0, low / 4), max(high, 0.1), POINTS)
    table = np.stack([_share_at_most(layer, shifts) for layer in layers])
    lines = [
        Curve("least layer", shifts.tolist(), table.min(0).tolist(), DENSE, (0, (1, 2))),
        Curve("greatest layer", shifts.tolist(), table.max(0).tolist(), DENSE, (0, (5, 2))),
        Curve("mean over layers", shifts.tolist(), table.mean(0).tolist()),
    ]
    caption = "Share of pre-activations at or below the shift (ReLU Strikes Back, 5.1 and 5.3)."
    return curves("Predicted sparsity of a shifted ReLU", lines, "shift", "zeros", caption, percent=True)


def _chosen(count: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, MOST_LAYERS))})


def _middle(layers: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Return the values between which 99 % of all layers' values lie, with 0 among them."""
    lows, highs = [], []
    for layer in layers:
        below = _below(layer)
        lows.append(float(np.interp(0.005, below, layer["edges"])))
        highs.append(float(np.interp(0.995, below, layer["edges"])))
    return min(0.0, *lows), max(0.0, *highs)


def _below(layer: Mapping[str, Any]) -> np.ndarray:
    counts = np.insert(np.cumsum(layer["counts"]), 0, 0)
    return counts / counts[-1]


def _share_at_most(layer: Mapping[str, Any], values: np.ndarray) -> np.ndarray:
    return np.interp(values, layer["edges"], _below(layer))


def _density(layer: Mapping[str, Any], low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the middles of even bins and the share of the values in each."""
    edges = np.linspace(low, high, 2 * POINTS)
    return (edges[1:] + edges[:-1]) / 2, np.diff(_share_at_most(layer, edges))


def _shade(row: int, count: int) -> Any:
    """Go from blue to orange over the layers."""
    return LAYERS(row / max(count - 1, 1))
