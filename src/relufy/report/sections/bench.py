"""`relufy bench`: tokens per second beside named baselines, in bars or over the number of sequences."""

from collections.abc import Mapping
from typing import Any

from relufy.plot_style import DENSE, SERIES, SPARSE
from relufy.report.content import Figure, Section, Table, number, share
from relufy.report.lines import WIDTH, Curve, curves
from relufy.report.run import Run
from relufy.report.sections.cells import cell, flat
from relufy.report.svg import PAGE_INK, draw

FIGURES = ("speedup_vs_dense", "bound_vs_dense", "fraction_of_bound", "speedup_vs_llama_cpp", "gb_per_second")
COLOURS = {"relufy, sparse": SPARSE, "relufy, own dense": DENSE}


def section(run: Run) -> Section:
    """Return the section of a benchmark."""
    found = run.document
    if "by_batch" in found:
        figures, tables = _batches(found)
    elif "tokens_per_second" in found:
        figures, tables = [_bars(found)], [_speeds(found)]
    else:
        figures, tables = [], [_listed(found)]
    machine = {k: v for k, v in flat(found.get("machine") or {}).items() if v is not None}
    tables.append(Table("Machine", ["", ""], [[key, cell(value)] for key, value in machine.items()]))
    return Section(
        title=f"Benchmark {found['benchmark']}: {found.get('label', found.get('shape', ''))}".rstrip(": "),
        lead="Medians of turns that the contenders take on the same machine.",
        tables=tables,
        figures=figures,
        notes=found.get("notes") or [],
        definitions=found.get("definitions") or DEFINITIONS,
    )


DEFINITIONS = {
    "bound": "dense bytes over sparse bytes a token: the speed-up if reading them were all the work",
    "reached": "the share of the bound that was measured",
    "own dense": "the same weights packed dense, on the same kernels and threads",
}


def contenders(found: Mapping[str, Any]) -> dict[str, float]:
    """Return tokens per second by contender, ours last."""
    others = (found.get("llama_cpp_tokens_per_second_by_type") or {}).items()
    own = {"relufy, own dense": found.get("dense_tokens_per_second")}
    own["relufy, sparse"] = found["tokens_per_second"]
    return {f"llama.cpp {kind}": speed for kind, speed in others} | {k: v for k, v in own.items() if v}


def _bars(found: Mapping[str, Any]) -> Figure:
    speeds = contenders(found)
    dense, bound = found.get("dense_tokens_per_second"), found.get("bound_vs_dense")

    def paint(axes: Any) -> None:
        for row, (name, speed) in enumerate(speeds.items()):
            axes.barh(row, speed, color=COLOURS.get(name, SERIES[5]), height=0.66)
            limit = dense * bound if name == "relufy, sparse" and dense and bound else 0.0
            if limit:
                axes.plot([limit, limit], [row - 0.42, row + 0.42], color=PAGE_INK, linewidth=1.5)
            place = (max(speed, limit), row)
            axes.annotate(
                f"{speed:.1f}", place, (6, 0), textcoords="offset points", va="center", weight="bold"
            )
        axes.set_yticks(range(len(speeds)), list(speeds))
        axes.set_xlim(0, 1.16 * axes.dataLim.x1)
        axes.set_xlabel("tokens/s" + ("; the line is the bound by the bytes" if dense and bound else ""))
        axes.invert_yaxis()
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)

    title = "Tokens per second"
    described = "; ".join(f"{name} {speed:.1f}" for name, speed in speeds.items())
    return Figure(title, draw(WIDTH, 0.9 + 0.36 * len(speeds), paint, title, described))


def _speeds(found: Mapping[str, Any]) -> Table:
    dense = found.get("dense_tokens_per_second")
    rows = [
        [name, number(speed, 1), f"{speed / dense:.2f}x" if dense else "-"]
        for name, speed in contenders(found).items()
    ]
    rows += [[name.replace("_", " "), number(found.get(name)), ""] for name in FIGURES if found.get(name)]
    for site, value in (found.get("density") or {}).items():
        rows.append([f"density of {site}", share(value), ""])
    return Table("Speed", ["", "tokens/s, or as named", "x own dense"], rows)


def _batches(found: Mapping[str, Any]) -> tuple[list[Figure], list[Table]]:
    sizes = list(found["by_batch"])
    by_size = [contenders(found["by_batch"][size]) for size in sizes]
    names = list(dict.fromkeys(name for speeds in by_size for name in speeds))
    lines = [
        Curve(n, [int(size) for size in sizes], [s.get(n) for s in by_size], COLOURS.get(n, ""), marker="o")
        for n in names
    ]
    figure = curves("Many sequences at once", lines, "sequences", "tokens/s, of all of them", log_x=True)
    rows = [
        [size, *(number(s.get(name), 1) for name in names)] for size, s in zip(sizes, by_size, strict=True)
    ]
    return [figure], [Table("Tokens per second, of all sequences", ["sequences", *names], rows)]


def _listed(found: Mapping[str, Any]) -> Table:
    """Return a benchmark's list of rows as it is, or its plain figures."""
    for value in found.values():
        if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
            plain = [flat(row) for row in value]
            columns = list(dict.fromkeys(key for row in plain for key in row))
            return Table("Figures", columns, [[cell(row.get(key)) for key in columns] for row in plain])
    rows = [[key, cell(value)] for key, value in flat(found).items() if isinstance(value, int | float)]
    return Table("Figures", ["", "value"], rows)
