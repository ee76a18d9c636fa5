"""`relufy sparsify`: make the zeros of a recipe, without any training."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from relufy.cli.calibration import CalibrationText, calibration_windows
from relufy.cli.options import Assignments, Json, Model, OutputFolder
from relufy.cli.output import note, print_json, result
from relufy.cli.progress import ProgressDisplay
from relufy.cli.quiet import quiet_libraries

if TYPE_CHECKING:
    from relufy.recipe import Recipe


def command(
    model: Model,
    output: OutputFolder,
    recipe: Annotated[
        str, typer.Option("--recipe", "--method", help="A shipped recipe (`relufy recipes`) or a YAML file.")
    ],
    calibration: CalibrationText = None,
    sparsity: Annotated[
        float | None, typer.Option(help="The method's target, between 0 and 1, instead of the recipe's.")
    ] = None,
    assign: Assignments = None,
    json: Json = False,
) -> None:
    """Make a model activation-sparse as a recipe says, and save it."""
    from relufy.recipe import load_recipe

    values = [f"sparsify.sparsity={sparsity}"] if sparsity is not None else []
    run(model, output, load_recipe(recipe).with_values([*values, *(assign or ())]), calibration or [], json)


def run(model: str, output: Path, recipe: "Recipe", texts: list[str], json: bool) -> None:
    """Sparsify as the recipe says; refuse early what would fail late."""
    from relufy.errors import UserError
    from relufy.files import refuse_occupied
    from relufy.hub import model_folder
    from relufy.method import Selecting

    if recipe.sparsify is None:
        raise UserError(f"the recipe {recipe.name} makes no zeros; `relufy finetune` runs it")
    is_calibrated = isinstance(recipe.sparsify, Selecting)
    if is_calibrated and not texts:
        raise UserError(
            f"{recipe.name} needs text to calibrate on: --calibration FILE, or --calibration self"
        )
    folder = model_folder(model)
    refuse_occupied(output, by_folder=True)

    from relufy.methods.sparsify import find, install, make_setting
    from relufy.model.checkpoint import load_model, load_tokenizer, save_checkpoint
    from relufy.model.empty import refuse_without_sites

    quiet_libraries()
    refuse_without_sites(folder)
    loaded, tokenizer, windows = load_model(folder), load_tokenizer(folder), None
    with ProgressDisplay() as display:
        if is_calibrated:
            windows = calibration_windows(texts, loaded, tokenizer, recipe.calibrate, display)
        setting = make_setting(loaded, recipe, windows, display.update)
        found = find(recipe.sparsify, setting)
    sparse = install(setting, recipe, found)
    provenance = {"calibration": [Path(text).name for text in texts]} if is_calibrated else {}
    save_checkpoint(sparse, tokenizer, output, provenance)
    if json:
        print_json({"output": str(output), "recipe": recipe.to_mapping(), "notes": list(found.notes)})
        return
    for line in found.notes:
        note(line)
    result(f"{output}: {recipe.name}, not fine-tuned")
