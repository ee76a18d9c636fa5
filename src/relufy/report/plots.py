"""The plots of the demo's report, as inline SVG."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes

from relufy.plot_style import DENSE, SERIES, SPARSE
from relufy.report.lines import CELL_COLOURS
from relufy.report.svg import PAGE_INK as INK
from relufy.report.svg import draw

PALETTE = {"dense": DENSE, "stage 1": SPARSE, "stage 2": SERIES[2]}
SHRINKING_COLOURS = ("#3f62b5", "#6f9be8", "#8a6fc9", "#5aaec4", "#c79be0", "#d9b45a")
CONSTANT_COLOURS = ("#8b95a5", "#aab2be", "#c3c9d2", "#747e8e")
"""Kinds of bytes that zeros make fewer, and those that they leave."""


def _beside(axes: Axes, x: float, row: int, label: str) -> None:
    axes.annotate(label, (x, row), (7, 0), textcoords="offset points", va="center", weight="bold")


def bytes_per_token(variants: Sequence[Mapping[str, Any]]) -> str:
    """Draw the bytes that the engine reads for a token, by kind: first those that zeros make fewer."""
    colours = kind_colours([v["cost"]["bytes_by_kind"] for v in variants])

    def paint(axes: Axes) -> None:
        names = [v["name"] for v in variants]
        left = [0.0] * len(variants)
        for kind, colour in colours.items():
            width = [v["cost"]["bytes_by_kind"][kind] / 1e6 for v in variants]
            axes.barh(names, width, left=left, color=colour, label=kind, height=0.62)
            left = [a + b for a, b in zip(left, width, strict=True)]
        for row, (total, variant) in enumerate(zip(left, variants, strict=True)):
            bound = f"  ({variant['bound']:.2f}x fewer)" if row else ""
            _beside(axes, total, row, f"{total:.2f} MB{bound}")
        axes.set_xlim(0, max(left) * 1.24)
        axes.set_xlabel("MB read for one token")
        axes.invert_yaxis()
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.legend(
            ncols=4,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            handlelength=0.9,
            columnspacing=1.4,
            labelspacing=0.3,
        )

    return draw(8.6, 3.0, paint, "Bytes read for one token", "Stacked bars of each variant, by kind of bytes")


def kind_colours(by_kind: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Return a colour for each kind, in drawing order: first those that shrink; constant ones grey."""
    shrinking = [kind for kind, amount in by_kind[0].items() if any(b[kind] < 0.98 * amount for b in by_kind)]
    constant = [kind for kind in by_kind[0] if kind not in shrinking]
    return {
        **dict(zip(shrinking, cycle(SHRINKING_COLOURS), strict=False)),
        **dict(zip(constant, cycle(CONSTANT_COLOURS), strict=False)),
    }


def sparsity(variant: Mapping[str, Any], groups: Sequence[Sequence[str]]) -> str:
    """Draw the share of zeros of every layer, at the sites that have some; a group's sites share a row."""
    sparse = [sites for sites in groups if any(variant["sparsity"].get(sites[0], ()))]
    names = [", ".join(sites) for sites in sparse]
    grid = [variant["sparsity"][sites[0]] for sites in sparse]
    num_layers = len(grid[0]) if grid else 1

    def paint(axes: Axes) -> None:
        axes.pcolormesh(grid or [[0.0]], cmap=CELL_COLOURS, vmin=0, vmax=1, edgecolor=INK + "00", linewidth=2)
        for row, shares in enumerate(grid):
            for layer, share in enumerate(shares if num_layers <= 16 else ()):
                colour = "white" if share > 0.45 else INK
                axes.text(
                    layer + 0.5, row + 0.5, f"{share:.0%}", ha="center", va="center", color=colour, size=9
                )
        axes.set_yticks([row + 0.5 for row in range(len(names))], names)
        ticks = range(0, num_layers, max(1, num_layers // 12))
        axes.set_xticks([layer + 0.5 for layer in ticks], [str(layer) for layer in ticks])
        axes.set_xlabel("layer")
        axes.invert_yaxis()
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)

    height = 0.7 + 0.36 * max(len(names), 1)
    return draw(5.2, height, paint, "Share of zeros", f"By layer, at {'; '.join(names)}")


def kl_recovered(variants: Sequence[Mapping[str, Any]]) -> str:
    """Draw, per stage, the KL to the dense model before and after the fine-tune, on a log scale."""

    def paint(axes: Axes) -> None:
        for row, variant in enumerate(variants):
            before, after = variant["kl_before"], variant["kl"]
            colour = PALETTE.get(variant["name"], INK)
            axes.plot([after["value"], before["value"]], [row, row], color=colour, linewidth=4, alpha=0.3)
            for point, face in ((before, "none"), (after, colour)):
                axes.errorbar(
                    point["value"], row, xerr=2 * point["standard_error"], fmt="o", markersize=9,
                    color=colour, markerfacecolor=face, markeredgewidth=1.8, capsize=3,
                )  # fmt: skip
                axes.annotate(
                    f"{point['value']:.3g}",
                    (point["value"], row),
                    (0, 11),
                    textcoords="offset points",
                    ha="center",
                )
            middle = (before["value"] * after["value"]) ** 0.5
            axes.annotate(
                f"{variant['kl_closed']:.1%} closed", (middle, row), (0, -14), textcoords="offset points",
                ha="center", weight="bold", color=colour,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yticks(range(len(variants)), [v["name"] for v in variants])
        axes.set_ylim(len(variants) - 0.4, -0.6)
        axes.margins(x=0.12)
        axes.grid(axis="x")
        axes.set_xlabel(
            "KL(dense || relufied), nats per token; open: bare swap, full: fine-tuned; bars: 2 s.e."
        )
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)

    return draw(8.6, 2.6, paint, "KL to the dense model", "Before and after the fine-tune of each stage")


def training(variants: Sequence[Mapping[str, Any]], loss: str) -> str:
    """Draw a loss over the steps of each fine-tune, on the batch that is trained on."""

    def paint(axes: Axes) -> None:
        for variant in variants:
            curve = variant["training"]["curve"]
            colour = PALETTE.get(variant["name"], INK)
            axes.plot(range(1, len(curve) + 1), curve, color=colour, label=variant["name"], linewidth=1.8)
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel(f"{loss}, nats per token")
        axes.grid(axis="y")
        axes.legend()

    return draw(5.2, 2.9, paint, "Training", f"{loss} over the steps of each fine-tune")


def speeds(variants: Sequence[Mapping[str, Any]]) -> str:
    """Draw every timed run, and the median, of the interleaved generations."""

    def paint(axes: Axes) -> None:
        for row, variant in enumerate(variants):
            samples, middle = variant["tokens_per_second"], variant["median_tokens_per_second"]
            colour = PALETTE.get(variant["name"], INK)
            axes.barh(row, middle, color=colour, height=0.55, alpha=0.85)
            axes.plot(samples, [row] * len(samples), "|", color=INK, markersize=11, markeredgewidth=1.1)
            _beside(axes, max(*samples, middle), row, f"{middle:.0f}")
        axes.set_yticks(range(len(variants)), [v["name"] for v in variants])
        axes.set_xlim(0, max(max(v["tokens_per_second"]) for v in variants) * 1.15)
        axes.set_xlabel("tokens/s, median of interleaved runs (ticks: each run)")
        axes.invert_yaxis()
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)

    return draw(5.2, 2.4, paint, "Tokens per second", "Median of interleaved runs, each run a tick")
