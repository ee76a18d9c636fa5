"""A comparison as tables, for the terminal and for Markdown."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from relufy.measure.cost import DenseSparse
from relufy.measure.quality import Difference, Perplexity
from relufy.methods.comparison import MEANINGS, Comparison, Outcome, Row
from relufy.methods.controls import CONTROLS

NOTHING = "-"


@dataclass(frozen=True)
class Shown:
    """A titled table; a column's name says which definition its figures have."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]


def tables(found: Comparison) -> list[Shown]:
    """Return the tables: quality beside controls, the four sparsities, and costs."""
    mode = f"tokens sparsified and scored: {found.settings['mode']}"
    controls = CONTROLS if any(row.outcome and row.outcome.controls for row in found.rows) else ()
    has_speed = any(row.outcome and row.outcome.speed for row in found.rows)
    quality = ("model_level_sparsity", "perplexity", "nats more than dense", *controls)
    sparsities = ("intrinsic_zero_fraction", "cett_sparsity", "gate_only_sparsity", "model_level_sparsity")
    costs = ("macs_paper, M", "x less", f"bytes_engine {found.settings['dtype']}, MB", "x less")
    speeds = ("tokens/s", "x dense") if has_speed else ()
    return [
        _table(f"Quality ({mode})", quality, found, lambda o: _quality(o, controls)),
        _table("Sparsity, in four definitions", (*sparsities, "p5 to p95"), found, _sparsities),
        _table("Cost of a token", (*costs, *speeds), found, lambda o: _costs(o, has_speed)),
    ]


def remarks(found: Comparison) -> list[str]:
    """Return what belongs beside the tables: overlap of the texts, reasons and notes, a line each."""
    lines = [found.overlap_line, found.domain_line, *found.notes]
    lines += [f"{_name(row)}: {row.reason}" for row in found.rows if row.reason]
    return list(
        dict.fromkeys([*lines, *(f"{row.method}: {note}" for row in found.rows for note in row.notes)])
    )


def markdown(found: Comparison) -> str:
    """Return the whole comparison as one Markdown document."""
    tokens = found.dense.perplexity.tokens
    lines = [
        f"# Training-free methods on {found.model}",
        "",
        f"{found.windows} windows of {found.window} tokens, {tokens:,} of them scored, the same for all; "
        f"perplexity of the dense model {_perplexity(found.dense.perplexity)}.",
    ]
    if found.command:
        lines += ["", "```", found.command, "```"]
    for table in tables(found):
        lines += ["", f"## {table.title}", "", *_pipes(table)]
    lines += ["", "## Remarks", "", *(f"- {line}" for line in remarks(found))]
    lines += ["", "## What the columns mean", "", *(f"- `{name}`: {text}" for name, text in MEANINGS.items())]
    texts = ((kind, file) for kind, files in found.texts.items() for file in files)
    lines += ["", "## How it was made", ""]
    lines += [f"- {kind}: `{file['file']}` (sha256 `{file['sha256']}`)" for kind, file in texts]
    lines += [f"- {name}: `{value}`" for name, value in found.settings.items()]
    lines += [f"- {package} {version}" for package, version in found.versions.items()]
    return "\n".join(lines) + "\n"


def _table(
    title: str, columns: Sequence[str], found: Comparison, cells: Callable[[Outcome], list[str]]
) -> Shown:
    rows = [["dense", NOTHING, *cells(found.dense)]]
    for row in found.rows:
        shown = cells(row.outcome) if row.outcome else [NOTHING] * len(columns)
        rows.append([row.method, f"{row.target:.0%}", *shown])
    return Shown(title, ("method", "target", *columns), rows)


def _quality(found: Outcome, controls: Sequence[str]) -> list[str]:
    shown = (found.controls.get(kind) for kind in controls)
    return [
        f"{found.zeros.model_level_sparsity:.1%}",
        _perplexity(found.perplexity),
        _difference(found.difference),
        *(_short(control.perplexity.perplexity) if control else NOTHING for control in shown),
    ]


def _sparsities(found: Outcome) -> list[str]:
    zeros = found.zeros
    shares = (
        zeros.intrinsic_zero_fraction,
        found.cett_sparsity,
        zeros.gate_only_sparsity,
        zeros.model_level_sparsity,
    )
    return [
        *(f"{share:.1%}" for share in shares),
        f"{zeros.model_level_p5:.0%} to {zeros.model_level_p95:.0%}",
    ]


def _costs(found: Outcome, has_speed: bool) -> list[str]:
    speed = found.speed
    speeds = [f"{speed.tokens_per_second:.0f}", f"{speed.ratio:.2f}"] if speed else [NOTHING, NOTHING]
    return [*_cost(found.macs_paper), *_cost(found.bytes_engine), *(speeds if has_speed else [])]


def _cost(found: DenseSparse | None) -> list[str]:
    return [f"{found.sparse / 1e6:.2f}", f"{found.ratio:.2f}"] if found else [NOTHING, NOTHING]


def _perplexity(found: Perplexity) -> str:
    return f"{_short(found.perplexity)} \u00b1 {_short(found.perplexity * found.standard_error)}"


def _difference(found: Difference) -> str:
    return f"{found.mean:+.4f} \u00b1 {found.standard_error:.4f}" if found.mean else NOTHING


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def _name(row: Row) -> str:
    return f"{row.method} at {row.target:.0%}"


def _pipes(table: Shown) -> list[str]:
    head = [f"| {' | '.join(table.columns)} |", f"| --- |{' ---: |' * (len(table.columns) - 1)}"]
    return head + [f"| {' | '.join(row)} |" for row in table.rows]
