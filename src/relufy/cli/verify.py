"""`relufy verify`: check the payload of a packed file against its checksums."""

from pathlib import Path
from typing import Annotated

import typer

from relufy.cli.options import Json
from relufy.cli.output import print_json, result


def command(
    file: Annotated[Path, typer.Argument(help="A packed file.")],
    json: Json = False,
) -> None:
    """Check a packed file, payload included; opening one checks only its header, table and size."""
    from relufy.engine.packed_file import verify

    checked = verify(file)
    if json:
        print_json({"path": str(file), "bytes_checked": checked, "ok": True})
    else:
        result(f"{file}: every checksum of {checked:,} bytes is right")
