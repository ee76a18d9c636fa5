"""`relufy measure`: zeros at every site, perplexity and the two costs of a token, on a text.

Further measurements are subcommands.
"""

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relufy.cli import measure_extended, measure_law, measure_overtime, measure_reuse
from relufy.cli.default_command import DefaultCommand
from relufy.cli.options import Json, Model
from relufy.cli.output import print_json
from relufy.cli.progress import ProgressDisplay
from relufy.cli.quiet import quiet_libraries
from relufy.schema import finite

if TYPE_CHECKING:
    from relufy.measure.measurement import Measurement

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
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Windows that run together.")] = 16,
    shift: Annotated[
        list[float] | None,
        typer.Option(help="Predict the sparsity of relu(z - SHIFT); may be repeated. Default: several."),
    ] = None,
    target: Annotated[
        list[float] | None,
        typer.Option(help="Suggest a shift for this sparsity; may be repeated. Default: several."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, or auto (layers over all GPUs); default: a GPU if there is one."),
    ] = None,
    precision: Annotated[str, typer.Option(help="Load the model in f32 or bf16.")] = "f32",
    by_layer: Annotated[bool, typer.Option("--by-layer", help="Show every layer, not only means.")] = False,
    extended: Annotated[
        bool,
        typer.Option(
            "--extended", help="Also what takes many runs, on 16 windows (see `relufy measure extended`)."
        ),
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the JSON document to this file.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure sparsity, perplexity and the cost of a token on a text."""
    from relufy.files import refuse_occupied
    from relufy.measure.measure import measure
    from relufy.measure.measurement import SHIFTS, TARGETS
    from relufy.processes import is_main, join_processes, leave_processes

    quiet_libraries()
    if output is not None:
        refuse_occupied(output, by_folder=False)
    join_processes()
    with ProgressDisplay() as display:
        found = measure(
            model,
            text,
            dense=dense,
            window=window,
            max_windows=max_windows,
            batch_size=batch_size,
            device=device,
            precision=precision,
            progress=display.update,
        )
    shifts, targets = tuple(shift or SHIFTS), tuple(target or TARGETS)
    if is_main():
        document = found.to_json(shifts, targets)
        more = measure_extended.measured(model, text, window, max_windows, batch_size) if extended else None
        if more is not None:
            document["extended"] = finite(more.to_json())
        deliver(found, document, output, by_layer, json)
        if more is not None and not json:
            measure_extended.show(more)
    leave_processes()


def deliver(
    found: "Measurement", document: dict[str, Any], output: Path | None, by_layer: bool, json: bool
) -> None:
    """Write the document to `output`, and print it, or tables of it."""
    from relufy.cli.measure_tables import show
    from relufy.files import replacing

    if output is not None:
        with replacing(output) as temporary:
            temporary.write_text(dumps(document, indent=2, allow_nan=False) + "\n")
    if json:
        print_json(document)
    else:
        show(found, document, by_layer)


# Further measurements are subcommands: app.command("NAME")(module.command), with cli/measure_NAME.py.
app.command("overtime")(measure_overtime.command)
app.command("extended")(measure_extended.command)
app.command("law")(measure_law.command)
app.command("reuse")(measure_reuse.command)
