"""`relufy cache`: the packed files that relufy made on first use."""

import typer

from relufy.cli.options import Json
from relufy.cli.output import print_json, result

app = typer.Typer(help="List or clear the cache of packed files.")


@app.command("list")
def list_entries(json: Json = False) -> None:
    """List the packed files in the cache."""
    from relufy.engine.cache import entries

    found = entries()
    if json:
        print_json([{"path": str(entry.path), "bytes": entry.bytes, "model": entry.model} for entry in found])
        return
    for entry in found:
        result(f"{entry.bytes / 1e6:8.1f} MB  {entry.model}  {entry.path}")
    result(f"{sum(entry.bytes for entry in found) / 1e6:8.1f} MB in all")


@app.command("clear")
def clear_entries(json: Json = False) -> None:
    """Remove the packed files in the cache."""
    from relufy.engine.cache import clear

    freed = clear()
    if json:
        print_json({"bytes_freed": freed})
    else:
        result(f"freed {freed / 1e6:.1f} MB")
