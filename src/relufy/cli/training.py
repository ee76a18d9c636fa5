"""Options that every command that trains has."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relufy.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LogFolder = Annotated[
    Path | None,
    typer.Option("--log", metavar="FOLDER", help="Write the reports of the steps here, as JSON lines."),
]
TensorBoard = Annotated[
    bool, typer.Option("--tensorboard", help="Write them for TensorBoard too, into the folder of --log.")
]
Shard = Annotated[
    bool, typer.Option("--shard", help="Under torchrun: split the model over the processes (FSDP2).")
]
SavedDtype = Annotated[str, typer.Option("--dtype", help="What the weights are saved in: f32 or bf16.")]

SPARSENING: dict[str, Any] = {"strength": (0.0, 1.0, 1.0), "until": (0.1, 0.7, 1.0)}
"""The way to a wanted share of zeros: it begins after a tenth of the steps and ends after seven."""

DTYPES = {"f32": "float32", "bf16": "bfloat16"}


def check_saving(dtype: str, tensorboard: bool, log: Path | None) -> None:
    """Raise UserError for options that contradict, before any long work."""
    if dtype not in DTYPES:
        raise UserError(f"weights are saved in {' or '.join(DTYPES)}, not {dtype!r}")
    if tensorboard and log is None:
        raise UserError("--tensorboard needs a folder to write to: give --log FOLDER")


def in_dtype(
    model: "PreTrainedModel", weights: "dict[str, torch.Tensor] | None", dtype: str
) -> "tuple[PreTrainedModel, dict[str, torch.Tensor] | None]":
    """Return the model, changed in place, and the weights that it does not hold itself, in this type."""
    import torch

    to = getattr(torch, DTYPES[dtype])
    whole = weights and {n: w.to(to) if w.is_floating_point() else w for n, w in weights.items()}
    return model.to(to), whole  # type: ignore[arg-type]
