"""Arguments and options that several commands share, so that they read alike everywhere."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A checkpoint folder, 'bundled', or a Hugging Face hub id.")]
ModelOrFile = Annotated[
    str, typer.Argument(help="A checkpoint folder, 'bundled', a hub id, or a packed file.")
]
OutputFolder = Annotated[Path, typer.Option("-o", "--output", help="The new checkpoint folder.")]
RecipeName = Annotated[
    str, typer.Option("--recipe", help="A shipped recipe (see `relufy recipes`) or a YAML file.")
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Another value in the recipe, as finetune.distill=0.5."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
KvDtype = Annotated[
    str | None,
    typer.Option(
        "--kv-dtype", help="Keys and values: f32, bf16 or f16; by default f32 for f32 weights, else f16."
    ),
]
Load = Annotated[
    bool, typer.Option("--load", help="Copy the weights into huge pages instead of mapping the file.")
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Threads of the engine; by default the cores it may use."),
]
