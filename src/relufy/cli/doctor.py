"""`relufy doctor`: why a model is not sparse, what each method may give it, and what to run next."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from relufy.cli.options import Json, Model
from relufy.cli.output import note, print_json, print_table, result
from relufy.cli.progress import ProgressDisplay
from relufy.cli.quiet import quiet_libraries

if TYPE_CHECKING:
    from relufy.doctor.doctor import Diagnosis
    from relufy.doctor.expectation import Expectation

SIGNS = {"good": "ok", "watch": "watch", "bad": "limits", "unchecked": "unchecked"}
"""What a finding's status is called on the terminal."""


def command(
    model: Model,
    text: Annotated[
        list[Path], typer.Option(help="Text of the model's kind (UTF-8, .jsonl or .gz); may be repeated.")
    ],
    control: Annotated[
        str | None, typer.Option(help="A ReLU or relufied model of the same size, to compare with.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A quarter of the text and fewer levels.")] = False,
    windows: Annotated[
        int | None, typer.Option(min=4, help="Windows drawn from the text; half of them are fitted on.")
    ] = None,
    window: Annotated[int | None, typer.Option(min=32, help="Tokens in a window.")] = None,
    json: Json = False,
) -> None:
    """Examine a model: where sparsity is missing and why, what methods may give, what to run next."""
    from relufy.doctor.doctor import diagnose
    from relufy.doctor.patient import FULL, QUICK

    quiet_libraries()
    effort = QUICK if quick else FULL
    effort = replace(effort, windows=windows or effort.windows, window=window or effort.window)
    with ProgressDisplay() as display:
        found = diagnose(model, text, control, effort, display.update, on_note=note)
    if json:
        print_json(found.to_json())
        return
    show(found)


def show(found: "Diagnosis") -> None:
    """Print the findings, the table of expectations, and the next steps."""
    result(
        f"{found.model}: {found.architecture}, {found.activation}; {found.windows} windows of {found.window} "
        f"tokens, perplexity {found.perplexity:.2f}, {found.seconds:.0f} s"
    )
    for finding in found.findings:
        result("")
        result(f"[{SIGNS[finding.status]}] {finding.title}")
        result(f"  {finding.verdict}")
        for line in finding.advice:
            result(f"  try: {line}")
    result("")
    columns = ["method", "neuron zeros", "weights unread", "bytes saved", "perplexity", "takes"]
    print_table("What to expect on this model", columns, [_row(row) for row in found.expectations])
    for row in found.expectations:
        result(f"{row.method}: {row.source}")
    for line in found.notes:
        result(f"note: {line}")
    result("")
    result("Next:")
    for line in found.next_steps:
        result(f"  {line}")


def _row(row: "Expectation") -> list[str]:
    change = "-" if row.perplexity_rise is None else f"{row.perplexity_rise:+.1%}"
    shares = (row.neuron_zeros, row.weights_unread, row.bytes_saved)
    return [row.method, *("-" if share is None else f"{share:.1%}" for share in shares), change, row.takes]
