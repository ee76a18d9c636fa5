"""`relufy finetune`: recover a model after its zeros were made, on text files or on self-written text."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from relufy.cli.calibration import SELF
from relufy.cli.options import Assignments, Json, Model, OutputFolder, RecipeName
from relufy.cli.output import note, print_json, result
from relufy.cli.progress import ProgressDisplay
from relufy.cli.quiet import quiet_libraries

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from transformers import PreTrainedModel

    from relufy.recipe import Finetune


def command(
    model: Model,
    output: OutputFolder,
    recipe: RecipeName,
    data: Annotated[
        list[str], typer.Option(help="A text file (repeatable), or 'self': the dense model writes it.")
    ],
    dense: Annotated[
        str | None, typer.Option(help="The dense original, if MODEL is already relufied.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps instead of the recipe's.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The peak, instead of the recipe's.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Windows in a step.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the order, and of self-written text.")] = None,
    assign: Assignments = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    json: Json = False,
) -> None:
    """Fine-tune a model as a recipe says, after making the recipe's zeros."""
    from relufy.files import refuse_occupied
    from relufy.hub import model_folder
    from relufy.recipe import load_recipe

    chosen = (
        load_recipe(recipe)
        .with_values(assign or ())
        .with_finetune(steps=steps, learning_rate=learning_rate, batch_size=batch_size, seed=seed)
    )
    settings = chosen.finetune
    source, original = model_folder(model), model_folder(dense or model)
    refuse_occupied(output, by_folder=True)
    if dense is None and settings.needs_teacher:
        refuse_as_teacher(source)

    from relufy.methods.sparsify import sparsify
    from relufy.model.checkpoint import load_model, load_tokenizer, save_checkpoint
    from relufy.model.empty import refuse_without_sites
    from relufy.train.finetune import finetune, remove_checkpoints

    quiet_libraries()
    refuse_without_sites(source)
    tokenizer, trained, teacher = load_tokenizer(source), load_model(source), load_model(original)
    with ProgressDisplay() as display:
        windows = training_windows(data, teacher, tokenizer, settings, display)
        if chosen.sparsify is not None:
            trained = sparsify(trained, chosen, windows, display.update)
        done = finetune(
            trained,
            settings,
            windows,
            teacher=teacher,
            output=output,
            resume=resume,
            on_log=lambda log: display.update("fine-tuning", log["step"], settings.steps, detail_of(log)),
        )
    save_checkpoint(trained, tokenizer, output, provenance={"data": data, "training_tokens": done.tokens})
    remove_checkpoints(output)
    report(str(output), chosen.name, done, json)


def refuse_as_teacher(folder: "Path") -> None:
    """Raise UserError if a checkpoint is relufied: it can't stand in for the dense original."""
    from relufy.activation_sparsity import BLOCK_KEY
    from relufy.errors import UserError
    from relufy.hub import read_config

    if read_config(folder).get(BLOCK_KEY):
        raise UserError(
            f"{folder} is relufied, so it can't be its own teacher; name its original with --dense"
        )


def training_windows(
    data: list[str],
    dense: "PreTrainedModel",
    tokenizer: Any,
    settings: "Finetune",
    display: ProgressDisplay,
) -> "np.ndarray":
    """Return the windows of the files, or as many self-written ones as the steps need."""
    from relufy.errors import UserError
    from relufy.text import read_windows
    from relufy.train.selftext import write_windows

    if data == [SELF]:
        count = settings.steps * settings.batch_size
        return write_windows(
            dense,
            count,
            settings.window,
            settings.seed,
            tokenizer.bos_token_id,
            progress=lambda done, total: display.update("writing text", done, total, "windows"),
        )
    if SELF in data:
        raise UserError("--data is either files or 'self', not both")

    windows = read_windows(data, tokenizer, settings.window)
    needed = settings.steps * settings.batch_size
    note(f"{len(windows)} windows of {settings.window} tokens, seen {needed / len(windows):.2g} times")
    return windows


def detail_of(log: dict[str, Any]) -> str:
    """Return the words beside the bar: the loss and the speed."""
    return f"loss {log['loss']:.4f}  {log['tokens_per_second']:,.0f} tokens/s"


def report(output: str, recipe: str, done: Any, json: bool) -> None:
    """Print what the fine-tune took."""
    if json:
        print_json(
            {
                "output": output,
                "recipe": recipe,
                "steps": done.steps,
                "tokens": done.tokens,
                "epochs": done.epochs,
                "seconds": done.seconds,
                "losses": list(done.losses),
            }
        )
        return
    result(
        f"{output}: {recipe}, {done.steps} steps, {done.tokens:,} tokens in {done.seconds:.0f} s, "
        f"loss {done.losses[0]:.4f} -> {done.losses[-1]:.4f}"
    )
