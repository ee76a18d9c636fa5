"""Measurements over time: aggregated sparsity, reuse at a window, the gamma-interval experiment.

Parts are known by what they hold, not by their names, so that a document may have any of them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from relufy.plot_style import DENSE, SERIES
from relufy.report.content import Figure, Section, Table, number, share
from relufy.report.lines import Curve, by_layer, curves
from relufy.report.run import Run
from relufy.report.sections.gamma import gamma_parts

AGGREGATED = {"measured", "shuffled", "independent", "uniform", "tokens"}
REUSE = {"windows", "measured", "shuffled", "tokens"}
GAMMA = {"points", "warmup", "perplexity"}
CURVES = {
    "measured": ("measured", SERIES[0], "-"),
    "shuffled": ("shuffled tokens", SERIES[2], (0, (5, 2))),
    "independent": ("mean (1 - p_i)^t", SERIES[1], (0, (1, 1.5))),
    "uniform": ("s^t (the paper's)", DENSE, (0, (3, 1, 1, 1))),
}


def section(run: Run) -> Section:
    """Return the section of a measurement over time."""
    found = run.document
    figures: list[Figure] = []
    tables: list[Table] = []
    for name, part in _parts(found):
        new_figures, new_tables = _read(name, part)
        figures += new_figures
        tables += new_tables
    tables += _plain(found)
    if not (figures or tables):
        raise KeyError("aggregated sparsity, reuse or gamma intervals")
    return Section(
        title=f"Over time: {found.get('model', run.name)}",
        lead=_lead(found),
        tables=tables,
        figures=figures,
        notes=found.get("notes") or [],
        definitions=found.get("definitions") or {},
    )


def _lead(found: Mapping[str, Any]) -> str:
    words = [f"{found[name]:,} {name}" for name in ("tokens", "windows") if isinstance(found.get(name), int)]
    return f"{' in '.join(words)}." if words else ""


def _parts(found: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the parts that can be drawn, wherever they are, with the name that they have there."""
    if set(found) >= AGGREGATED or set(found) >= REUSE or (set(found) >= GAMMA and _is_gamma(found)):
        yield name, found
        return
    for key, value in found.items():
        if isinstance(value, Mapping):
            yield from _parts(value, key)


def _is_gamma(found: Mapping[str, Any]) -> bool:
    points = found["points"]
    return bool(points) and isinstance(points, list) and {"gamma", "kind"} <= set(points[0])


def _read(name: str, part: Mapping[str, Any]) -> tuple[list[Figure], list[Table]]:
    if set(part) >= AGGREGATED:
        return _aggregated(part)
    if "points" in part:
        return gamma_parts(part)
    return _reuse(part)


def _aggregated(part: Mapping[str, Any]) -> tuple[list[Figure], list[Table]]:
    tokens = part["tokens"]
    lines = []
    for name, (words, colour, dashes) in CURVES.items():
        ys = part[name]["mean"]
        errors = part.get("standard_error") or () if name == "measured" else ()
        lines.append(Curve(words, tokens[: len(ys)], ys, colour, dashes, errors=errors[: len(ys)]))
    caption = (
        "Share of neurons that none of the first t tokens needs, a mean over layers (band: 2 s.e. over "
        "windows). What exceeds the shuffled tokens is similarity of neighbours."
    )
    own = curves(
        "Aggregated sparsity", lines, "tokens t", "unused neurons", caption, log_x=True, percent=True
    )
    layers = part["measured"]["layers"]
    ends = sorted({min(t, len(tokens)) for t in (1, 8, 32, len(tokens))})
    by = {f"t = {tokens[t - 1]}": [layer[t - 1] for layer in layers] for t in ends}
    figure = by_layer("Aggregated sparsity by layer", by, "unused neurons", "After t tokens.")
    return [own, figure], [_aggregated_table(part, ends)]


def _aggregated_table(part: Mapping[str, Any], ends: list[int]) -> Table:
    rows = []
    for t in ends:
        values = [part[name]["mean"][t - 1] if t <= len(part[name]["mean"]) else None for name in CURVES]
        rows.append([str(part["tokens"][t - 1]), *map(share, values)])
    return Table("Aggregated sparsity", ["tokens", *(words for words, _, _ in CURVES.values())], rows)


def _reuse(part: Mapping[str, Any]) -> tuple[list[Figure], list[Table]]:
    windows = part["windows"]
    names = {"measured": "measured", "shuffled": "shuffled tokens"}
    lines = [Curve(names[n], windows, part[n]["mean"], CURVES[n][1], CURVES[n][2], marker="o") for n in names]
    caption = "Share of a token's active neurons that were active at one of the last w tokens."
    figure = curves(
        "Reuse at a window", lines, "window w, tokens", "reused", caption, log_x=True, percent=True
    )
    rows = [
        [str(window), *(share(part[name]["mean"][index]) for name in names)]
        for index, window in enumerate(windows)
    ]
    return [figure], [Table("Reuse at a window", ["window", *names.values()], rows)]


def _plain(found: Mapping[str, Any]) -> list[Table]:
    """Return single figures that have a name of their own, and values by layer."""
    rows = [
        [key.replace("_", " "), number(value, 4)]
        for key, value in found.items()
        if isinstance(value, float) and key != "version"
    ]
    return [Table("Figures", ["", "value"], rows)] if rows else []
