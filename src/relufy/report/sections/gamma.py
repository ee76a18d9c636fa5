"""The gamma-interval experiment: perplexity where every other block of tokens loads nothing new."""

from collections.abc import Mapping
from typing import Any

from relufy.plot_style import SERIES
from relufy.report.content import Figure, Table, number, share, with_error
from relufy.report.lines import Curve, curves

KINDS = {"reuse": ("neurons loaded before", SERIES[0]), "random": ("as many at random", SERIES[2])}


def gamma_parts(part: Mapping[str, Any]) -> tuple[list[Figure], list[Table]]:
    """Return the curve of perplexity over gamma beside random sets, and its table."""
    dense = part["perplexity"]["perplexity"]
    lines = []
    for kind, (words, colour) in KINDS.items():
        points = [point for point in part["points"] if point["kind"] == kind]
        if points:
            ys = [point["perplexity"]["perplexity"] for point in points]
            errors = [_error(point) for point in points]
            lines.append(Curve(words, [p["gamma"] for p in points], ys, colour, marker="o", errors=errors))
    caption = (
        f"After a warm-up of {part['warmup']} tokens, every other block of gamma tokens may only use neurons "
        "loaded before it (ReLU Strikes Back, 5.1); band: 2 s.e. of the difference to no limit, by window."
    )
    level = (f"no limit {dense:.2f}", dense)
    figure = curves("Neuron reuse", lines, "gamma, tokens", "perplexity", caption, True, level=level)
    return [figure], [_table(part)]


def _error(point: Mapping[str, Any]) -> float | None:
    """Return the error of the perplexity's difference to no limit, which is paired by window."""
    error = (point.get("difference") or {}).get("standard_error")
    return None if error is None else error * point["perplexity"]["perplexity"]


def _table(part: Mapping[str, Any]) -> Table:
    rows = []
    for point in part["points"]:
        difference = point.get("difference") or {}
        rows.append(
            [
                str(point["gamma"]),
                KINDS.get(point["kind"], (point["kind"], ""))[0],
                number(point["perplexity"]["perplexity"]),
                with_error(difference.get("mean"), difference.get("standard_error"), 4),
                share(point.get("loaded_share")),
                share(point.get("dropped_share")),
            ]
        )
    columns = ["gamma", "neurons", "perplexity", "nats more", "loaded", "dropped"]
    return Table("Neuron reuse", columns, rows)
