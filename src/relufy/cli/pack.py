"""`relufy pack`: a checkpoint to the engine's one weight file."""

from pathlib import Path
from typing import Annotated

import typer

from relufy.cli.options import Json, Model
from relufy.cli.output import print_json, result


def command(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="The packed file to write.")],
    dtype: Annotated[str, typer.Option("--dtype", help="How weights are stored: f32.")] = "f32",
    json: Json = False,
) -> None:
    """Pack a checkpoint into the engine's weight file."""
    from relufy.engine import pack

    packed = pack(model, output, dtype=dtype)
    size = packed.stat().st_size
    if json:
        print_json({"path": str(packed), "bytes": size, "dtype": dtype})
    else:
        result(f"{packed}: {size / 1e6:.1f} MB, {dtype}")
