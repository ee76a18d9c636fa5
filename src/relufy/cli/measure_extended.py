"""`relufy measure extended`: CETT, PPL-p% sparsity, predictivity, co-activation and energy."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from relufy.cli.options import Json, Model
from relufy.cli.output import print_json, print_table, result
from relufy.cli.quiet import quiet_libraries

if TYPE_CHECKING:
    from relufy.measure.extended import Extended, ExtendedMeasurement


def command(
    model: Model,
    text: Annotated[list[Path], typer.Option(help="A text file (UTF-8, or .gz); may be repeated.")],
    window: Annotated[int, typer.Option(min=4, help="Tokens in a window.")] = 256,
    max_windows: Annotated[
        int, typer.Option(min=1, help="Measure no more than the first windows; the text is run many times.")
    ] = 16,
    only: Annotated[
        str | None,
        typer.Option(
            help="Only some of cett, ppl_sparsity, predictivity, coactivation, energy: with commas between."
        ),
    ] = None,
    cett_target: Annotated[float, typer.Option(help="The relative error of CETT.")] = 0.2,
    percent: Annotated[
        list[float] | None,
        typer.Option(help="By how much perplexity may grow, 1 % by default; may be repeated."),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of predictors.")] = 64,
    mac: Annotated[float, typer.Option(help="Energy of a multiply-accumulate, in any unit.")] = 0.5,
    weight_read: Annotated[float, typer.Option(help="Energy of reading a weight, in that unit.")] = 0.5,
    event: Annotated[float, typer.Option(help="Energy of an event (a non-zero input), in that unit.")] = 0.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows that run together.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of random masks, samples and training.")] = 0,
    json: Json = False,
) -> None:
    """Measure what takes many runs: CETT, PPL-p% sparsity, predictivity, co-activation, energy."""
    from relufy.measure.energy import EnergyConstants
    from relufy.measure.extended import PARTS, ExtendedOptions, extended

    quiet_libraries()
    options = ExtendedOptions(
        parts=tuple(part.strip() for part in only.split(",")) if only else PARTS,
        cett_target=cett_target,
        percents=tuple(percent or (1.0,)),
        rank=rank,
        constants=EnergyConstants(mac, weight_read, event),
        batch_size=batch_size,
        seed=seed,
    )
    found = extended(model, text, window, max_windows, options)
    if json:
        print_json(found.to_json())
        return
    show(found)


def measured(
    model: str, text: list[Path], window: int, max_windows: int | None, batch_size: int
) -> "ExtendedMeasurement":
    """Return all parts as `relufy measure --extended` has them, on at most as many windows as by default."""
    from relufy.measure.extended import MAX_WINDOWS, ExtendedOptions, extended

    most = min(MAX_WINDOWS, max_windows or MAX_WINDOWS)
    return extended(model, text, window, most, ExtendedOptions(batch_size=batch_size))


def show(found: "ExtendedMeasurement") -> None:
    """Print a table for each part that was measured, why the others were not, and the definitions."""
    from relufy.measure.extended import DEFINITIONS

    result(f"{found.model}: {found.tokens:,} tokens in {found.windows} windows of {found.window}")
    for part in (_show_cett, _show_ppl_sparsity, _show_predictivity, _show_coactivation, _show_energy):
        part(found.found)
    for line in found.found.notes:
        result(f"note: {line}")
    for name, meaning in DEFINITIONS.items():
        result(f"{name}: {meaning}")


def _show_cett(found: "Extended") -> None:
    if (cett := found.cett) is None:
        return
    columns = zip(cett.sparsity, cett.epsilon, cett.error, cett.error_p95, strict=True)
    rows = [
        [str(layer), f"{share:.1%}", f"{epsilon:.3g}", f"{error:.3f}", f"{p95:.3f}"]
        for layer, (share, epsilon, error, p95) in enumerate(columns)
    ]
    rows.append(["mean", f"{cett.mean:.1%}", "", "", ""])
    title = f"neurons that can be left out at CETT {cett.target:g}"
    print_table(title, ["layer", "left out", "epsilon", "error", "p95 of tokens"], rows)


def _show_ppl_sparsity(found: "Extended") -> None:
    if found.ppl_sparsity is None:
        return
    rows = [
        [f"{one.criterion}, {one.percent:g} %", f"{one.mean:.1%}", f"{one.level:.3f}", f"{one.ratio:.4f}"]
        for one in found.ppl_sparsity
    ]
    title = "neurons that can be left out before perplexity has grown"
    print_table(title, ["criterion", "left out", "its c", "perplexity / whole"], rows)


def _show_predictivity(found: "Extended") -> None:
    if (known := found.predictivity) is None:
        return
    rows = [
        [
            f"{one.layer} {one.kind}",
            f"{one.multiple:g}",
            f"{one.kept_share:.1%}",
            f"{one.recall:.1%}",
            f"{one.precision:.1%}",
        ]
        for one in known.predictors
    ]
    columns = ["layer", "x active", "kept", "recall", "precision"]
    print_table(f"predictors of rank {known.rank}", columns, rows)
    rows = [
        [
            one.mask,
            f"{one.multiple:g}",
            f"{one.kept_share:.1%}",
            f"{one.perplexity.perplexity:.2f}",
            f"{one.difference.mean:+.4f} \u00b1 {one.difference.standard_error:.4f}",
        ]
        for one in known.masks
    ]
    title = f"layers {', '.join(map(str, known.layers))} masked; unmasked {known.perplexity.perplexity:.2f}"
    print_table(title, ["mask", "x active", "kept", "perplexity", "nats more"], rows)


def _show_coactivation(found: "Extended") -> None:
    if (known := found.coactivation) is None:
        return
    columns = zip(known.gap, known.independent, known.silent, strict=True)
    rows = [
        [str(layer), f"{gap:.3f}", f"{independent:.3f}", str(silent)]
        for layer, (gap, independent, silent) in enumerate(columns)
    ]
    title = f"co-activation of {known.neurons} neurons a layer"
    print_table(title, ["layer", "gap", "if independent", "silent"], rows)


def _show_energy(found: "Extended") -> None:
    if (known := found.energy) is not None:
        result(
            f"energy a token: {known.dense:.4g} dense, {known.sparse:.4g} with zeros, {known.ratio:.2f}x less"
        )
