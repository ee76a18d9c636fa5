"""Plots as inline SVG that takes its ink from the page's text colour (light, dark and print)."""

import hashlib
import io
import re
from collections.abc import Callable
from html import escape
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt

from relufy.plot_style import plot_style

PAGE_INK = "#010203"
"""Stands for the page's text colour; `to_svg` replaces it."""
CLEAR = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none")
STYLE = plot_style(PAGE_INK) | CLEAR


def draw(
    width: float,
    height: float,
    paint: Callable[[Any], None],
    title: str = "",
    description: str = "",
    columns: int = 1,
) -> str:
    """Return the SVG of a figure (inches), painted by `paint`, which gets its axes: all, if there are more.

    Title and description are for those who cannot see it.
    """
    with plt.rc_context(STYLE):  # type: ignore[arg-type]
        figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained")
        paint(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return to_svg(buffer.getvalue(), title, description)


def to_svg(document: str, title: str = "", description: str = "") -> str:
    """Return the bare <svg> element: the page's ink and font, a width that follows it, ids of its own."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([^;\"]*?)'sans-serif'[^;\"]*", r"font: \1inherit", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, count=1, flags=re.DOTALL)
    svg = svg.replace("<svg ", '<svg class="plot" ', 1)
    return _labelled(_with_own_ids(svg), title, description).replace(PAGE_INK, "currentColor")


def _with_own_ids(svg: str) -> str:
    """Drop the ids that nothing refers to, and make the others the plot's own: a page has many plots."""
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    own = hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{own}-{m[1]}"' if m[1] in used else "", svg)
    return re.sub(r'(href="|url\()#([^")]+)', rf"\1#{own}-\2", svg)


def _labelled(svg: str, title: str, description: str) -> str:
    if not title:
        return svg.replace("<svg ", '<svg aria-hidden="true" ', 1)
    own = hashlib.sha256((title + svg).encode()).hexdigest()[:8]
    words = (
        f'<title id="t{own}">{escape(title)}</title><desc id="d{own}">{escape(description or title)}</desc>'
    )
    svg = svg.replace("<svg ", f'<svg role="img" aria-labelledby="t{own} d{own}" ', 1)
    end = svg.index(">") + 1
    return svg[:end] + words + svg[end:]
