"""What commands print: results on stdout (text, a table, or one JSON document), everything else on stderr."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from relufy.schema import finite

if TYPE_CHECKING:
    from relufy.engine import Engine

_IS_SILENT = os.environ.get("RANK", "0") != "0"
"""Whether torchrun started this process beside another one, which speaks for all."""

stdout = Console(highlight=False, quiet=_IS_SILENT)
stderr = Console(stderr=True, highlight=False, quiet=_IS_SILENT)


def note(text: str) -> None:
    """Tell the user something that is no result, on stderr."""
    stderr.print(text, markup=False, soft_wrap=True)


def note_ignored(options: Mapping[str, Any], context: int | None, engine: "Engine") -> None:
    """Say in one line on stderr which options of the user change nothing, if there are such."""
    from relufy.engine.request import IGNORED, ignored_options

    said = [f"--{name.replace('_', '-')} is ignored: {IGNORED[name]}" for name in ignored_options(options)]
    if context is not None and context > engine.context:
        said.append(f"--context {context} is more than the model's {engine.context}, which it has")
    if said:
        note("; ".join(said))


def result(text: str) -> None:
    """Print one line of the result on stdout, as it is."""
    stdout.print(text, markup=False, soft_wrap=True)


def print_json(document: Any) -> None:
    """Write the one JSON document of a `--json` command; what is no number (NaN) becomes null."""
    sys.stdout.write(json.dumps(finite(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], console: Console = stdout
) -> None:
    """Print a table whose first column names the row and whose other columns hold numbers."""
    table = Table(title=title or None, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
