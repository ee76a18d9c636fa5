"""`relufy sparsify`: make the zeros of a recipe, without any training."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from relufy.cli.calibration import CalibrationText, calibration_windows
from relufy.cli.options import Assignments, Json, Model, OutputFolder
from relufy.cli.output import note, print_json, result
from relufy.cli.progress import ProgressDisplay
from relufy.cli.quiet import quiet_libraries
from relufy.errors import UserError

if TYPE_CHECKING:
    from relufy.recipe import Recipe


BUDGET = "With --budget"
"""The help's panel of what only the automatic search takes."""


def command(
    context: typer.Context,
    model: Model,
    output: OutputFolder,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "--method", help="A shipped recipe (`relufy recipes`) or a YAML file."),
    ] = None,
    calibration: CalibrationText = None,
    sparsity: Annotated[
        float | None, typer.Option(help="The method's target, between 0 and 1, instead of the recipe's.")
    ] = None,
    assign: Assignments = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Instead of a recipe: what saves most within a rise of perplexity, as 1%."),
    ] = None,
    minutes: Annotated[
        float, typer.Option(min=0.05, help="The search ends by then.", rich_help_panel=BUDGET)
    ] = 10.0,
    selection: Annotated[
        list[str] | None,
        typer.Option(help="Text that decides; by default parts of --calibration.", rich_help_panel=BUDGET),
    ] = None,
    test: Annotated[
        list[str] | None,
        typer.Option(help="Text that reports and decides nothing.", rich_help_panel=BUDGET),
    ] = None,
    windows: Annotated[
        int, typer.Option(min=8, help="Windows of all three texts together, at most.", rich_help_panel=BUDGET)
    ] = 240,
    window: Annotated[
        int, typer.Option(min=2, help="Tokens in a window of the search.", rich_help_panel=BUDGET)
    ] = 256,
    dtype: Annotated[
        str,
        typer.Option(help="Save time in a file packed so: f32, bf16, int8 or int4.", rich_help_panel=BUDGET),
    ] = "f32",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads of the engine; by default the cores.", rich_help_panel=BUDGET),
    ] = None,
    seed: Annotated[int, typer.Option(help="Deals the text out.", rich_help_panel=BUDGET)] = 0,
    no_measure: Annotated[
        bool,
        typer.Option(
            "--no-measure",
            help="Take a table's reading speeds, not this machine's, so that another run repeats it.",
            rich_help_panel=BUDGET,
        ),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw what was tried (.svg, .png).", rich_help_panel=BUDGET)
    ] = None,
    json: Json = False,
) -> None:
    """Make a model activation-sparse as a recipe says, or as a budget of perplexity allows, and save it."""
    if (recipe is None) == (budget is None):
        raise UserError("give --recipe NAME or --budget 1%, one of them")
    if budget is None:
        refuse_search_options(context)
        run(model, output, chosen_recipe(str(recipe), sparsity, assign), calibration or [], json)
        return
    if sparsity is not None or assign:
        raise UserError("--sparsity and --set belong to a recipe; with --budget the search decides")
    from relufy.cli import budget as search

    options = search.BudgetOptions(
        budget=budget,
        text=calibration or (),
        selection=selection or (),
        test=test or (),
        minutes=minutes,
        dtype=dtype,
        seed=seed,
        window=window,
        windows=windows,
        threads=threads,
        measure=not no_measure,
        plot=plot,
        json=json,
    )
    search.run(model, output, options)


SEARCH_OPTIONS = (
    "minutes", "selection", "test", "windows", "window", "dtype", "threads", "seed", "no_measure", "plot"
)  # fmt: skip
OF_RECIPE = {"window": "--set calibrate.window=", "seed": "--set calibrate.seed="}
"""What says the same of a recipe."""


def refuse_search_options(context: typer.Context) -> None:
    """Raise UserError if an option was given that only --budget takes."""
    for name in SEARCH_OPTIONS:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            instead = f"; of a recipe, {OF_RECIPE[name]}" if name in OF_RECIPE else ""
            raise UserError(f"--{name.replace('_', '-')} belongs to --budget{instead}")


def chosen_recipe(name: str, sparsity: float | None, assign: list[str] | None) -> "Recipe":
    """Return the recipe with the values given. Raises UserError."""
    from relufy.recipe import load_recipe

    values = [f"sparsify.sparsity={sparsity}"] if sparsity is not None else []
    return load_recipe(name).with_values([*values, *(assign or ())])


def run(model: str, output: Path, recipe: "Recipe", texts: list[str], json: bool) -> None:
    """Sparsify as the recipe says; refuse early what would fail late."""
    from relufy.files import refuse_occupied
    from relufy.hub import model_folder
    from relufy.method import Auto

    stages = [stage for stage in recipe.stages() if stage.sparsify is not None]
    if not stages:
        raise UserError(f"the recipe {recipe.name} makes no zeros; `relufy finetune` runs it")
    if any(isinstance(stage.sparsify, Auto) for stage in stages):
        raise UserError(f"{recipe.name} is the automatic search: give --budget and its options, no recipe")
    calibrated = [stage for stage in stages if stage.sparsify.needs_text]
    if texts and not calibrated:
        raise UserError(f"{recipe.name} looks at no text: leave --calibration out")
    if calibrated and not texts:
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
    notes: list[str] = []
    with ProgressDisplay() as display:
        if calibrated:
            windows = calibration_windows(texts, loaded, tokenizer, calibrated[0].calibrate, display)
        for stage in stages:
            setting = make_setting(loaded, stage, windows, display.update)
            found = find(stage.sparsify, setting)
            if not found.sparsifiers:
                raise UserError(f"{stage.name} found nothing to leave out: {'; '.join(found.notes)}")
            install(setting, stage, found)
            notes += found.notes
    provenance = {"calibration": [Path(text).name for text in texts]} if calibrated else {}
    save_checkpoint(loaded, tokenizer, output, provenance)
    if json:
        print_json({"output": str(output), "recipe": recipe.to_mapping(), "notes": notes})
        return
    for line in notes:
        note(line)
    result(f"{output}: {recipe.name}, not fine-tuned")
