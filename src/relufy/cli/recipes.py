"""`relufy recipes`: the recipes that ship, and what is in one."""

from typing import Annotated

import typer

from relufy.cli.output import result


def command(
    name: Annotated[str | None, typer.Argument(help="A shipped recipe or a file: print its YAML.")] = None,
) -> None:
    """List the recipes that ship, or print one as YAML (a start for your own)."""
    from relufy.recipe import load_recipe, shipped_recipes

    if name is not None:
        result(load_recipe(name).to_yaml().rstrip())
        return
    for recipe in shipped_recipes().values():
        result(f"{recipe.name:<16}{recipe.description}")
