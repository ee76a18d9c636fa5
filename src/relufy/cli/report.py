"""`relufy report`: results that were written with --json, as one page."""

from pathlib import Path
from typing import Annotated

import typer

from relufy.cli.output import note


def command(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="JSON of measure, compare, eval, doctor or bench; log.jsonl of a training, or its folder."
        ),
    ],
    output: Annotated[
        list[Path], typer.Option("-o", "--output", help="The page, .html or .md; may be repeated.")
    ],
    title: Annotated[str, typer.Option(help="The page's title.")] = "relufy report",
) -> None:
    """Turn results into one page of tables and plots, in one file without any request."""
    from relufy.files import refuse_occupied
    from relufy.report.report import check_output, make_report

    for path in output:
        check_output(path)
        refuse_occupied(path, by_folder=False)
    found = make_report(runs, title)
    for path in output:
        found.write(path)
        note(f"{path}: {len(found.sections)} results")
