"""`relufy measure overtime`: aggregated sparsity, neuron reuse and the gamma-interval experiment."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from relufy.cli.options import Json, Model, whole_numbers
from relufy.cli.output import print_json, print_table, result
from relufy.cli.quiet import quiet_libraries

if TYPE_CHECKING:
    from relufy.measure.overtime import OverTime

SHOWN_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 150, 256, 512, 1024)


def command(
    model: Model,
    text: Annotated[list[Path], typer.Option(help="A text file (UTF-8, or .gz); may be repeated.")],
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 256,
    max_windows: Annotated[
        int | None, typer.Option(min=1, help="Measure no more than the first windows.")
    ] = None,
    site: Annotated[
        str, typer.Option(help="neuron (the activation's output) or down (what down reads).")
    ] = "neuron",
    reuse_windows: Annotated[
        str, typer.Option(help="How many last tokens a neuron may be reused from: 1,2,4.")
    ] = "1,2,4,8,16,32,64",
    gammas: Annotated[str, typer.Option(help="Lengths of open and frozen blocks.")] = "1,2,4,8,16,32,64",
    warmup: Annotated[int, typer.Option(min=0, help="Open tokens before the first block.")] = 128,
    reset: Annotated[
        bool, typer.Option("--reset", help="Forget what is loaded where an open block begins.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows that run together.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the random sets and of the shuffling.")] = 0,
    json: Json = False,
) -> None:
    """Measure what consecutive tokens share: aggregated sparsity, neuron reuse, perplexity under reuse."""
    from relufy.measure.overtime import DEFINITIONS, overtime

    quiet_libraries()
    found = overtime(
        model,
        text,
        window,
        max_windows,
        site,
        whole_numbers(reuse_windows, "--reuse-windows"),
        whole_numbers(gammas, "--gammas"),
        warmup,
        reset,
        batch_size,
        seed,
    )
    if json:
        print_json(found.to_json())
        return
    result(
        f"{found.model}: {found.tokens:,} tokens in {found.windows} windows of {found.window}, {found.site}"
    )
    _show_aggregated(found)
    _show_reuse(found)
    _show_gamma(found)
    for name, meaning in DEFINITIONS.items():
        result(f"{name}: {meaning}")


def _show_aggregated(found: "OverTime") -> None:
    curves = ("measured", "shuffled", "independent", "uniform")
    means = {curve: found.aggregated.mean(curve) for curve in curves}
    rows = [
        [str(t), *(f"{mean[t - 1]:.2%}" if t <= len(mean) else "-" for mean in means.values())]
        for t in SHOWN_TOKENS
        if t <= len(means["measured"])
    ]
    print_table("aggregated sparsity after t tokens, mean over layers", ["t", *curves], rows)


def _show_reuse(found: "OverTime") -> None:
    reuse = found.reuse
    columns = zip(reuse.windows, reuse.mean(), reuse.mean("shuffled"), strict=True)
    rows = [[str(w), f"{measured:.1%}", f"{shuffled:.1%}"] for w, measured, shuffled in columns]
    print_table("active neurons that were active in the last w tokens", ["w", "measured", "shuffled"], rows)


def _show_gamma(found: "OverTime") -> None:
    gamma = found.gamma
    rows = [
        [
            f"{reused.gamma}",
            f"{reused.perplexity.perplexity:.2f}",
            f"{reused.difference.mean:+.4f} \u00b1 {reused.difference.standard_error:.4f}",
            f"{random.perplexity.perplexity:.2f}",
            f"{random.difference.mean:+.4f} \u00b1 {random.difference.standard_error:.4f}",
            f"{reused.loaded_share:.1%}",
            f"{reused.dropped_share:.2%}",
        ]
        for reused, random in zip(gamma.of("reuse"), gamma.of("random"), strict=True)
    ]
    title = (
        f"perplexity with blocks of gamma tokens, every other one frozen, after {gamma.warmup} tokens"
        f"{', loaded neurons forgotten at each open block' * gamma.reset}; "
        f"unlimited {gamma.perplexity.perplexity:.2f}"
    )
    columns = ["gamma", "reuse", "nats more", "random", "nats more", "loaded", "dropped by reuse"]
    print_table(title, columns, rows)
