"""`relufy pretrain`: train a new model from scratch, with the activation wanted, on text."""

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relufy.cli.finetune import detail_of, report, report_findings
from relufy.cli.options import Assignments, Json, OutputFolder
from relufy.cli.output import note
from relufy.cli.progress import ProgressDisplay
from relufy.cli.quiet import quiet_libraries
from relufy.cli.training import SPARSENING, LogFolder, SavedDtype, Shard, TensorBoard, check_saving, in_dtype

if TYPE_CHECKING:
    from relufy.recipe import Finetune


def command(
    output: OutputFolder,
    config: Annotated[
        str,
        typer.Option(help="A shape (3m, 30m, 125m, 350m, 1.3b), a config.json, or a checkpoint or hub id."),
    ],
    data: Annotated[
        list[str],
        typer.Option(help="Text: a file, a folder or hub:owner/name; PATH#FIELD=WEIGHT; repeatable."),
    ],
    activation: Annotated[
        str | None,
        typer.Option(help="relu, relu2, helu, drelu, silu, gelu, beta-silu:8 or any that transformers has."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="The tokenizer of a folder, of a hub id, or 'bundled'.")
    ] = None,
    train_tokenizer: Annotated[
        int | None, typer.Option(metavar="SIZE", help="Make a tokenizer of so many pieces from the text.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Windows in a step.")] = None,
    window: Annotated[int | None, typer.Option(min=2, help="Tokens in a window.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The peak.")] = None,
    optimizer: Annotated[str | None, typer.Option(metavar="adamw|muon")] = None,
    schedule: Annotated[str | None, typer.Option(metavar="linear|cosine|constant|wsd")] = None,
    penalty_target: Annotated[
        float | None, typer.Option(help="The share of zeros wanted at the neurons, as 0.9.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the weights and of the order.")] = None,
    assign: Assignments = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    log: LogFolder = None,
    tensorboard: TensorBoard = False,
    shard: Shard = False,
    dtype: SavedDtype = "f32",
    json: Json = False,
) -> None:
    """Train a new model from scratch on text."""
    from relufy.errors import UserError
    from relufy.files import refuse_occupied
    from relufy.schema import to_mapping

    refuse_occupied(output, by_folder=True)
    if (tokenizer is None) == (train_tokenizer is None):
        raise UserError("give one of --tokenizer FOLDER and --train-tokenizer SIZE")
    check_saving(dtype, tensorboard, log)

    from relufy.activation_sparsity import activation_name
    from relufy.model.checkpoint import save_checkpoint
    from relufy.processes import is_main, join_processes, leave_processes, made_once
    from relufy.train.checkpoints import remove_checkpoints
    from relufy.train.data import open_windows
    from relufy.train.pretrain import check_pretraining, pretrain

    quiet_libraries()
    settings = _settings(
        assign or [],
        steps=steps,
        batch_size=batch_size,
        window=window,
        learning_rate=learning_rate,
        optimizer=optimizer,
        schedule=schedule,
        seed=seed,
        penalty=None if penalty_target is None else SPARSENING | {"target": penalty_target},
    )
    check_pretraining(config, settings, activation)
    join_processes()
    pieces = made_once(lambda: _tokenizer(tokenizer, train_tokenizer, data))
    with ProgressDisplay() as display:
        model, done = pretrain(
            config,
            settings,
            open_windows(data, pieces, settings.window, settings.seed),
            activation=activation,
            tokenizer=pieces,
            output=output,
            resume=resume,
            shard=shard,
            log_folder=log,
            tensorboard=tensorboard,
            on_log=lambda found: display.update("training", found["step"], settings.steps, detail_of(found)),
        )
    if is_main():
        made_of = {"config": Path(config).name, "finetune": to_mapping(settings)}
        made_of["activation"] = activation or activation_name(model.config.to_dict())
        origin = {"pretrained": made_of, "data": data, "training_tokens": done.tokens}
        model, weights = in_dtype(model, done.weights, dtype)
        save_checkpoint(model, pieces, output, provenance=origin, weights=weights)
        remove_checkpoints(output)
        report_findings([done])
        report(str(output), f"{made_of['config']} with {made_of['activation']}", [done], json)
    leave_processes()


def _settings(assignments: list[str], **options: Any) -> "Finetune":
    """Return the defaults with what the user gave instead. Raises UserError."""
    from relufy.recipe import Recipe
    from relufy.train.pretrain import PRETRAINING

    given = [f"finetune.{key}={dumps(value)}" for key, value in options.items() if value is not None]
    return Recipe("pretrain", finetune=PRETRAINING).with_values([*assignments, *given]).finetune


def _tokenizer(place: str | None, size: int | None, data: list[str]) -> Any:
    """Return the tokenizer of a folder or model, or one made of the text."""
    if place is not None:
        from relufy.model.checkpoint import load_tokenizer

        return load_tokenizer(place)
    from relufy.train.tokenizer import train_tokenizer

    assert size is not None
    note(f"making a tokenizer of {size} pieces")
    return train_tokenizer(data, size)
