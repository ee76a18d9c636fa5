"""`relufy pack`: a checkpoint to the engine's one weight file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relufy.cli.options import Json, Model
from relufy.cli.output import print_json, result
from relufy.cli.progress import ProgressDisplay
from relufy.errors import UserError

if TYPE_CHECKING:
    from relufy.engine.packed_file import Header


def command(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="The packed file to write.")],
    dtype: Annotated[
        str, typer.Option("--dtype", help="How weights are stored: f32, bf16, int8 or int4.")
    ] = "f32",
    for_: Annotated[
        str,
        typer.Option(
            "--for",
            help="exact: zeros are skipped. reuse, predictor: and gates can be. dense: nothing is.",
        ),
    ] = "exact",
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="Text files: show the perplexity of this type and of f32 on them."),
    ] = None,
    lora: Annotated[
        list[Path] | None,
        typer.Option("--lora", metavar="DIR", help="Merge this LoRA adapter (PEFT); may be repeated."),
    ] = None,
    lora_scale: Annotated[
        list[float] | None,
        typer.Option("--lora-scale", help="Multiply what an adapter adds: one for all, or one for each."),
    ] = None,
    json: Json = False,
) -> None:
    """Pack a checkpoint into the engine's weight file."""
    from relufy.engine import pack
    from relufy.engine.packed_file import read_header
    from relufy.engine.perplexity import compare_with_f32
    from relufy.text import read_text

    words = read_text(text) if text else None
    adapters: dict[str, Any] = {"lora": lora or (), "lora_scale": _scales(lora or [], lora_scale or [])}
    with ProgressDisplay() as display:
        packed = pack(
            model,
            output,
            dtype,
            for_,
            progress=lambda done, total: display.update("packing", done, total),
            **adapters,
        )
    document = _document(read_header(packed))
    if words is not None:
        document |= compare_with_f32(packed, model, words, **adapters)
    if json:
        print_json(document)
    else:
        _print(document)


def _scales(adapters: list[Path], scales: list[float]) -> float | list[float]:
    if scales and not adapters:
        raise UserError("--lora-scale needs --lora: there is no adapter to scale")
    return scales if len(scales) > 1 else (scales or [1.0])[0]


def _document(header: "Header") -> dict[str, Any]:
    metadata = header.metadata()
    sites = [site for s in metadata["activation_sparsity"]["sparsifiers"] for site in s["sites"]]
    return {
        "path": str(header.path),
        "bytes": header.file_bytes,
        "dtype": metadata["dtype"],
        "for": metadata["for"],
        "bits_per_weight": header.bits_per_weight(),
        "sparse_sites": list(dict.fromkeys(sites)),
        "lora": metadata["lora"],
    }


def _print(document: dict[str, Any]) -> None:
    from relufy.engine.perplexity import MAX_TOKENS, WINDOW

    dtype = document["dtype"] + " (embedding and head int8)" * (document["dtype"] == "int4")
    size, bits = document["bytes"] / 1e6, document["bits_per_weight"]
    result(f"{document['path']}: {size:.1f} MB, {dtype}, {bits:.2f} bits per weight with scales and padding")
    result(f"skips {_skipped(document)}")
    for adapter in document["lora"]:
        result(f"merged the adapter {adapter['name']}, scaled by {adapter['scale']:g}")
    if "perplexity" in document:
        result(
            f"perplexity {document['perplexity']:.3f}, f32 {document['perplexity_f32']:.3f}: "
            f"{document['perplexity_change_percent']:+.2f} % "
            f"(at most {MAX_TOKENS:,} tokens in windows of {WINDOW})"
        )


def _skipped(document: dict[str, Any]) -> str:
    if not document["sparse_sites"]:
        return "nothing: this model has no site with zeros"
    if document["for"] == "dense":
        return "nothing: it is packed for dense"
    return f"what zeros at {' '.join(document['sparse_sites'])} make unnecessary"
