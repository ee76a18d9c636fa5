"""`relufy measure`: zeros at every site, perplexity and the two costs of a token, on a text."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from relufy.cli import measure_extended, measure_law, measure_overtime, measure_reuse
from relufy.cli.default_command import DefaultCommand
from relufy.cli.options import Json, Model
from relufy.cli.output import print_json, print_table, result
from relufy.cli.quiet import quiet_libraries

if TYPE_CHECKING:
    from relufy.measure.cost import DenseSparse
    from relufy.measure.measure import Measurement
    from relufy.measure.quality import Perplexity

app = typer.Typer(cls=DefaultCommand, invoke_without_command=True)


@app.callback()
def command(
    model: Model,
    text: Annotated[list[Path], typer.Option(help="A text file (UTF-8, or .gz); may be repeated.")],
    dense: Annotated[
        str | None, typer.Option(help="The dense model; by default the one it was made from.")
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 256,
    max_windows: Annotated[
        int | None, typer.Option(min=1, help="Measure no more than the first windows.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Count the bytes of a file packed so: f32, bf16, int8 or int4.")
    ] = "f32",
    json: Json = False,
) -> None:
    """Measure sparsity, perplexity and the cost of a token on a text."""
    from relufy.measure.measure import DEFINITIONS, measure

    quiet_libraries()
    found = measure(model, text, dense=dense, window=window, max_windows=max_windows, dtype=dtype)
    if json:
        print_json(found.to_json())
        return
    result(f"{found.model}: {found.tokens:,} tokens in {found.windows} windows of {found.window}")
    show_sparsity(found)
    show_costs(found)
    for note in found.notes:
        result(f"note: {note}")
    for name, meaning in DEFINITIONS.items():
        result(f"{name}: {meaning}")


def show_sparsity(found: "Measurement") -> None:
    """Print a table of layers and sites, and their means."""
    by_layer = list(zip(*found.sparsity.values(), strict=True))
    means = [sum(shares) / len(shares) for shares in found.sparsity.values()]
    rows = [
        [name, *(f"{share:.1%}" for share in shares)]
        for name, shares in (*enumerate(by_layer), ("mean", means))
    ]
    print_table("sparsity", ["layer", *found.sparsity], [[str(cell) for cell in row] for row in rows])


def show_costs(found: "Measurement") -> None:
    """Print perplexity and costs, dense and sparse."""
    rows = [
        ["perplexity", _perplexity(found.dense_perplexity), _perplexity(found.perplexity), ""],
        ["macs_paper a token", *_costs(found.macs_paper, 1e6, "M")],
        [
            f"bytes_engine a token, {found.dtype}, context {found.context}",
            *_costs(found.bytes_engine, 1e6, "MB"),
        ],
    ]
    print_table("quality and cost", ["", "dense", "this model", "dense / this"], rows)


def _perplexity(found: "Perplexity | None") -> str:
    if found is None:
        return "-"
    return f"{found.perplexity:.2f} \u00b1 {found.perplexity * found.standard_error:.2f}"


def _costs(found: "DenseSparse | None", unit: float, name: str) -> list[str]:
    if found is None:
        return ["-", "-", "-"]
    return [f"{found.dense / unit:.2f} {name}", f"{found.sparse / unit:.2f} {name}", f"{found.ratio:.2f}x"]


# Further measurements are subcommands: app.command("NAME")(module.command), with cli/measure_NAME.py.
app.command("overtime")(measure_overtime.command)
app.command("extended")(measure_extended.command)
app.command("law")(measure_law.command)
app.command("reuse")(measure_reuse.command)
