"""`relufy generate`: text from the engine, streamed."""

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relufy.cli.options import Json, KvDtype, Load, ModelOrFile, Threads
from relufy.cli.output import note, print_json

if TYPE_CHECKING:
    from relufy.engine import Engine, GenerationStats


def command(
    model: ModelOrFile,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample within this probability mass.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be repeated.")] = None,
    threads: Threads = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Positions to keep; by default the model's.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="How a folder is packed: f32 (the default), bf16, int8 or int4.")
    ] = None,
    kv_dtype: KvDtype = None,
    load: Load = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only the text: no figures on stderr.")] = False,
    json: Json = False,
) -> None:
    """Continue a text on the CPU engine; a folder is packed into the cache on first use."""
    from relufy.engine import Engine

    engine = Engine(model, threads=threads, context=context, kv_dtype=kv_dtype, load=load, dtype=dtype)
    generation = engine.generate(
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop or ()),
    )
    for piece in generation:
        if not json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if json:
        print_json({"prompt": prompt, **generation_document(generation), "engine": engine_document(engine)})
        return
    sys.stdout.write("\n")
    if not quiet:
        note(stats_line(generation.stats, engine))


def generation_document(generation: Any) -> dict[str, Any]:
    """Return a finished generation as plain data."""
    stats = generation.stats
    rates = ("prefill_tokens_per_second", "decode_tokens_per_second", "gb_per_second")
    figures = asdict(stats) | {name: getattr(stats, name) for name in rates}
    return {"text": generation.text, "token_ids": list(generation.token_ids), "stats": figures}


def engine_document(engine: "Engine") -> dict[str, Any]:
    """Return how an engine stores and computes, as plain data."""
    return {
        "bits_per_weight": engine.header.bits_per_weight(),
        "kv_dtype": engine.kv_dtype,
        "threads": engine.threads,
        "isa": engine.isa,
        "huge_page_share": engine.huge_page_share,
    }


def stats_line(stats: "GenerationStats", engine: "Engine") -> str:
    """Return the speed and the bytes of a generation, in one line."""
    return (
        f"prompt {stats.prompt_tokens} tokens at {stats.prefill_tokens_per_second:.0f} tokens/s, "
        f"then {stats.new_tokens} at {stats.decode_tokens_per_second:.0f} tokens/s; "
        f"{stats.weight_bytes_per_token / 1e6:.2f} MB of weights a token, {stats.gb_per_second:.1f} GB/s, "
        f"{engine.header.bits_per_weight():.2f} bits a weight"
    )
