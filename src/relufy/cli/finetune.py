"""`relufy finetune`: recover a model after its zeros were made, on text or on what the model writes."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relufy.cli.calibration import SELF
from relufy.cli.options import Assignments, Json, Model, OutputFolder, RecipeName
from relufy.cli.output import note, print_json, result
from relufy.cli.progress import ProgressDisplay
from relufy.cli.quiet import quiet_libraries
from relufy.cli.training import (
    DTYPES,
    SPARSENING,
    LogFolder,
    SavedDtype,
    Shard,
    TensorBoard,
    check_saving,
)

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from transformers import PreTrainedModel

    from relufy.recipe import Finetune, Recipe
    from relufy.train.finetune import FinetuneResult
    from relufy.train.stream import WindowStream


def command(
    model: Model,
    output: OutputFolder,
    recipe: RecipeName,
    data: Annotated[
        list[str],
        typer.Option(
            help="Text: a file, a folder or hub:owner/name, or 'self': the dense model writes it. "
            "PATH#FIELD=WEIGHT; repeatable."
        ),
    ],
    dense: Annotated[
        str | None, typer.Option(help="The dense original, if MODEL is already relufied.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps instead of the recipe's.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The peak, instead of the recipe's.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Windows in a step.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the order, and of self-written text.")] = None,
    target: Annotated[
        float | None, typer.Option(help="The share of zeros at the neurons that a penalty brings about.")
    ] = None,
    lora: Annotated[
        int | None, typer.Option(metavar="RANK", help="Train adapters of this rank, and merge them.")
    ] = None,
    assign: Assignments = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    log: LogFolder = None,
    tensorboard: TensorBoard = False,
    shard: Shard = False,
    dtype: SavedDtype = "f32",
    json: Json = False,
) -> None:
    """Fine-tune a model as a recipe says, after making the recipe's zeros."""
    from relufy.files import refuse_occupied
    from relufy.hub import model_folder

    chosen = chosen_recipe(
        recipe,
        assign or [],
        target,
        lora,
        steps=steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=seed,
    )
    source, original = model_folder(model), model_folder(dense or model)
    refuse_occupied(output, by_folder=True)
    check_saving(dtype, tensorboard, log)
    needs_teacher = any(stage.finetune.needs_teacher for stage in chosen.stages())
    if dense is None and needs_teacher:
        refuse_as_teacher(source)

    import torch

    from relufy.model.checkpoint import load_model, load_tokenizer
    from relufy.model.empty import refuse_without_sites
    from relufy.processes import is_main, join_processes, leave_processes
    from relufy.train.run import Run, run_recipe

    quiet_libraries()
    refuse_without_sites(source)
    join_processes()
    tokenizer, trained = load_tokenizer(source), load_model(source)
    teacher = load_model(original) if needs_teacher or SELF in _names(data) else None
    texts: dict[tuple[int, ...], Any] = {}

    def text_of(settings: "Finetune") -> "np.ndarray | WindowStream":
        key = settings.window, settings.seed, settings.steps * settings.batch_size
        if key not in texts:
            texts[key] = training_text(data, teacher, tokenizer, settings, display)
        return texts[key]

    with ProgressDisplay() as display:
        run = Run(
            output=output,
            tokenizer=tokenizer,
            text_of=text_of,
            teacher=teacher,
            resume=resume,
            shard=shard,
            provenance={"data": data},
            dtype=getattr(torch, DTYPES[dtype]),
            log_folder=log,
            tensorboard=tensorboard,
            on_log=lambda stage, found: display.update(
                f"fine-tuning {stage.name}", found["step"], stage.finetune.steps, detail_of(found)
            ),
            progress=display.update,
            on_note=note,
        )
        results = run_recipe(trained, chosen, run)
    if is_main():
        report_findings(results)
        report(str(output), chosen.name, results, json)
    leave_processes()


def chosen_recipe(
    name: str, assignments: list[str], target: float | None, lora: int | None, **changes: Any
) -> "Recipe":
    """Return the recipe with what the command line says instead, in every stage that trains.

    Raises UserError.
    """
    from relufy.recipe import Lora, load_recipe

    recipe = load_recipe(name).with_values(assignments)
    recipe = recipe.with_finetune(**changes, lora=None if lora is None else Lora(rank=lora))
    return recipe if target is None else with_target(recipe, target)


def with_target(recipe: "Recipe", target: float) -> "Recipe":
    """Return the recipe with a penalty towards this share of zeros; a way to a target of its own is kept.

    A shift that is taken from a wanted share is taken from this one.
    """
    from relufy.method import Relufication
    from relufy.recipe import Penalty

    penalty = recipe.finetune.penalty
    if penalty is None or penalty.target is None:
        penalty = Penalty(**SPARSENING)
    aimed = replace(recipe.finetune, penalty=replace(penalty, target=target))
    method = recipe.sparsify
    if isinstance(method, Relufication) and method.sparsity is not None:
        method = replace(method, sparsity=target)
    return replace(
        recipe,
        sparsify=method,
        finetune=aimed if recipe.finetune.steps else recipe.finetune,
        then=recipe.then and with_target(recipe.then, target),
    )


def refuse_as_teacher(folder: "Path") -> None:
    """Raise UserError if a checkpoint is relufied: it can't stand in for the dense original."""
    from relufy.activation_sparsity import BLOCK_KEY
    from relufy.errors import UserError
    from relufy.hub import read_config

    if read_config(folder).get(BLOCK_KEY):
        raise UserError(
            f"{folder} is relufied, so it can't be its own teacher; name its original with --dense"
        )


def training_text(
    data: list[str],
    dense: "PreTrainedModel | None",
    tokenizer: Any,
    settings: "Finetune",
    display: ProgressDisplay,
) -> "np.ndarray | WindowStream":
    """Return the text of the sources, with as many self-written windows as their share of the steps needs."""
    from relufy.processes import made_once
    from relufy.train.data import open_windows, parse_source
    from relufy.train.selftext import write_windows

    others = [source for source in map(parse_source, data) if source.where != SELF]
    own = next((source for source in map(parse_source, data) if source.where == SELF), None)
    windows = None
    if own is not None:
        assert dense is not None
        total = sum(source.weight or 0.0 for source in (*others, own))
        share = own.weight / total if others and own.weight else 1.0
        count = max(1, round(share * settings.steps * settings.batch_size))
        windows = made_once(
            lambda: write_windows(
                dense,
                count,
                settings.window,
                settings.seed,
                tokenizer.bos_token_id,
                progress=lambda done, all_: display.update("writing text", done, all_, "windows"),
            )
        )
        if not others:
            return windows
    text = open_windows(
        others, tokenizer, settings.window, settings.seed, own=windows, own_weight=own and own.weight
    )
    if text.num_windows is not None:
        seen = settings.steps * settings.batch_size / text.num_windows
        note(f"{text.num_windows} windows of {settings.window} tokens, seen {seen:.2g} times")
    return text


def _names(data: list[str]) -> list[str]:
    from relufy.train.data import parse_source

    return [parse_source(source).where for source in data]


def detail_of(log: dict[str, Any]) -> str:
    """Return the words beside the bar: the loss, the zeros at the neurons, the dead, the speed."""
    words = [f"loss {log['loss']:.4f}"]
    neurons = log.get("sparsity", {}).get("neuron")
    if neurons:
        words.append(f"neurons {100 * sum(neurons) / len(neurons):.1f} % zero")
    if log.get("dead"):
        words.append(f"{100 * sum(log['dead']) / len(log['dead']):.1f} % dead")
    if log.get("union_density"):
        union = sum(log["union_density"]) / len(log["union_density"])
        words.append(f"{100 * union:.0f} % used in 8 tokens")
    return "  ".join([*words, f"{log['tokens_per_second']:,.0f} tokens/s"])


def report_findings(results: "list[FinetuneResult]") -> None:
    """Say what in the logs deserves a look, and what to try."""
    from relufy.train.diagnose import diagnose

    for done in results:
        for finding in diagnose(done.logs):
            note(finding)


def report(output: str, recipe: str, results: "list[FinetuneResult]", json: bool) -> None:
    """Print what the training took."""
    trained = [done for done in results if done.steps]
    losses = [loss for done in trained for loss in done.losses]
    steps, tokens = sum(done.steps for done in trained), sum(done.tokens for done in trained)
    seconds = sum(done.seconds for done in trained)
    if json:
        print_json(
            {
                "output": output,
                "recipe": recipe,
                "steps": steps,
                "tokens": tokens,
                "epochs": trained[-1].epochs if trained else 0.0,
                "seconds": seconds,
                "losses": losses,
                "logs": [log for done in trained for log in done.logs],
            }
        )
        return
    if not losses:
        result(f"{output}: {recipe}, no training")
        return
    result(
        f"{output}: {recipe}, {steps} steps, {tokens:,} tokens in {seconds:.0f} s, "
        f"loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    )
