"""`relufy measure reuse`: what neuron reuse costs in perplexity, and what it gains."""

from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from relufy.cli.options import Json, Model, Threads
from relufy.cli.output import print_json, print_table, result
from relufy.cli.progress import ProgressDisplay
from relufy.errors import UserError


def command(
    model: Model,
    text: Annotated[list[Path], typer.Option(help="A text file (UTF-8, or .gz); may be repeated.")],
    gammas: Annotated[str, typer.Option(help="Periods, with commas between them.")] = "1,2,4,8,16",
    policies: Annotated[
        str, typer.Option(help="Reuse policies, with commas between them.")
    ] = "window,adaptive,blocks,prompt",
    reuse_window: Annotated[
        int, typer.Option(min=1, help="How many last tokens' neurons window and adaptive reuse.")
    ] = 32,
    share: Annotated[
        float, typer.Option(help="The share of the neurons that the policy prompt keeps.")
    ] = 0.5,
    most_missed: Annotated[
        float, typer.Option(help="The share of missed neurons above which adaptive opens.")
    ] = 0.1,
    window: Annotated[int, typer.Option(min=3, help="Tokens in a window.")] = 256,
    warm_up: Annotated[int, typer.Option(min=1, help="The first of them, which are read in full.")] = 128,
    max_windows: Annotated[int, typer.Option(min=1, help="Measure no more than the first windows.")] = 20,
    dtype: Annotated[str, typer.Option(help="How weights are stored: f32, bf16, int8 or int4.")] = "f32",
    threads: Threads = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens written in a turn, for the speed.")] = 32,
    turns: Annotated[int, typer.Option(min=0, help="Timed turns; 0: speed is not measured.")] = 3,
    control: Annotated[
        bool, typer.Option("--control/--no-control", help="Random sets of the window's sizes, too.")
    ] = True,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the JSON document here.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw both curves: .svg, .png or .pdf.")] = None,
    json: Json = False,
) -> None:
    """Measure the perplexity, bytes and speed of neuron reuse, for each policy and period."""
    from relufy.measure.reuse import ReuseOptions, measure_reuse

    _check_outputs(output, plot)
    options = ReuseOptions(
        gammas=_numbers(gammas),
        policies=tuple(policies.split(",")),
        window=reuse_window,
        share=share,
        most_missed=most_missed,
        length=window,
        warm_up=warm_up,
        max_windows=max_windows,
        dtype=dtype,
        threads=threads,
        tokens=tokens,
        turns=turns,
        has_control=control,
    )
    with ProgressDisplay() as display:
        found = measure_reuse(model, text, options, display.update)
    _deliver(found, output, plot, json)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--gammas takes whole numbers, such as 1,2,4, found {text!r}") from None


def _check_outputs(output: Path | None, plot: Path | None) -> None:
    from relufy.bench.plot import check_plot_path
    from relufy.files import refuse_occupied

    for path in (output, plot):
        if path is not None:
            refuse_occupied(path, by_folder=False)
    if plot is not None:
        check_plot_path(plot)


def _deliver(found: dict[str, Any], output: Path | None, plot: Path | None, json: bool) -> None:
    from relufy.files import replacing
    from relufy.report.reuse import plot_reuse

    if output is not None:
        with replacing(output) as temporary:
            temporary.write_text(dumps(found, indent=2) + "\n")
    if plot is not None:
        plot_reuse(found, plot)
    if json:
        print_json(found)
        return
    _print(found)


def _print(found: dict[str, Any]) -> None:
    exact = found["exact"]
    result(
        f"{found['model']}: {found['tokens']:,} tokens in {found['windows']} windows; exact: perplexity "
        f"{exact['perplexity']:.3f}, {exact['bytes_per_token'] / 1e6:.3f} MB a token"
    )
    columns = ["setting", "perplexity, %", "frozen", "candidates", "fired", "bytes / exact's"]
    rows = [_cells(row) for row in found["settings"]]
    if any(row["tokens_per_second"] is not None for row in found["settings"]):
        columns += ["tokens/s", "x exact", "x own dense"]
        rows = [row + _speeds(data) for row, data in zip(rows, found["settings"], strict=True)]
    print_table("neuron reuse", columns, rows)
    for name, meaning in found["definitions"].items():
        result(f"{name}: {meaning}")


def _cells(row: dict[str, Any]) -> list[str]:
    error = row["standard_error_percent"]
    frozen = row["frozen_tokens"] / (row["frozen_tokens"] + row["open_tokens"])
    return [
        row["label"],
        f"{row['perplexity_change_percent']:+.2f}" + ("" if error is None else f" ± {error:.2f}"),
        *(f"{share:.1%}" for share in (frozen, row["candidate_share"], row["fired_share"])),
        f"{row['bytes_vs_exact']:.3f}",
    ]


def _speeds(row: dict[str, Any]) -> list[str]:
    speeds = [row[name] for name in ("tokens_per_second", "speedup_vs_exact", "speedup_vs_dense")]
    return ["-" if speed is None else f"{speed:.2f}" for speed in speeds]
