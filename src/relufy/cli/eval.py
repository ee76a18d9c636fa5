"""`relufy eval`: perplexity and lm-evaluation-harness tasks, alone or beside the dense model."""

import os
import sys
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from relufy.cli.options import Json, ModelOrFile, Threads
from relufy.cli.output import note, print_json, print_table, result

if TYPE_CHECKING:
    from relufy.evaluation.result import Evaluation


def command(
    model: ModelOrFile,
    before: Annotated[
        str | None, typer.Option(help="The model to compare with, as a rule the dense one.")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="A text file for perplexity (UTF-8, or .gz); may be repeated.")
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="Tasks or groups of lm-evaluation-harness, with commas between them.")
    ] = "",
    task_folder: Annotated[
        list[Path] | None, typer.Option(help="A folder of task files of your own; may be repeated.")
    ] = None,
    backend: Annotated[str, typer.Option(help="What runs the model: hf or engine.")] = "hf",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take no more than the first documents of each task.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in the prompt; by default the task's own number.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts that are read together.")] = 8,
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window of text.")] = 256,
    max_windows: Annotated[
        int | None, typer.Option(min=1, help="Read no more than the first windows of text.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="How the engine packs a folder: f32 (the default), bf16, int8 or int4.")
    ] = None,
    threads: Threads = None,
    device: Annotated[
        str | None, typer.Option(help="Where the Hugging Face model runs; a GPU where there is one.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A new file for the JSON document.")
    ] = None,
    json: Json = False,
) -> None:
    """Evaluate on text and on tasks, with standard errors; beside another model, with paired tests."""
    _quiet()
    from relufy.evaluation.evaluate import evaluate
    from relufy.evaluation.options import EvalOptions
    from relufy.files import refuse_occupied, replacing

    if output is not None:
        refuse_occupied(output, by_folder=False)
    options = EvalOptions(
        backend=backend,  # type: ignore[arg-type]
        task_folders=tuple(task_folder or ()),
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        window=window,
        max_windows=max_windows,
        dtype=dtype,
        threads=threads,
        device=device,
    )
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    found = evaluate(model, before, text or (), names, options)
    document = found.to_json()
    if output is not None:
        with replacing(output) as temporary:
            temporary.write_text(dumps(document, indent=2, allow_nan=False) + "\n")
    if json:
        print_json(document)
    else:
        show(found)
    if output is not None:
        note(f"wrote {output}")


def show(found: "Evaluation") -> None:
    """Print the table, the verdicts, what belongs beside them, and what the words mean."""
    from relufy.evaluation.result import DEFINITIONS

    columns, rows = found.table()
    title = found.model + (f" beside {found.before}" if found.before else "")
    shown = [place for place, name in enumerate(columns) if name not in ("difference", "verdict")]
    print_table(title, [columns[place] for place in shown], [[row[place] for place in shown] for row in rows])
    for row in rows:
        if verdict := row[-1]:
            result(f"{row[0].strip()}, {row[1]}: {verdict}")
    for line in found.notes:
        result(f"note: {line}")
    for name, meaning in DEFINITIONS.items():
        if found.before or not name.startswith(("difference", "p", "could")):
            result(f"{name}: {meaning}")


def _quiet() -> None:
    """Keep other libraries' bars off everything but a terminal, and their advice off it too."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
