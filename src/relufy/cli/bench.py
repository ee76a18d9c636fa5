"""`relufy bench`: measured speed, beside named baselines in the same run."""

from collections.abc import Callable
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from relufy.cli.options import Json, Threads
from relufy.cli.output import note, print_json, print_table, result
from relufy.cli.progress import ProgressDisplay

app = typer.Typer(help="Measure speed: beside our own dense pack, llama.cpp, and the memory itself.")

Output = Annotated[Path | None, typer.Option("-o", "--output", help="Write the JSON document to this file.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw the result: .svg, .png or .pdf.")]
Turns = Annotated[int, typer.Option("--turns", min=1, help="Timed turns of each, after a warm-up.")]


@app.command("decode")
def decode(
    shape: Annotated[
        str | None, typer.Option(help="Random weights of this shape: 1.3b, 7b, or tiny (for tests).")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A real model instead: a checkpoint folder, 'bundled', or a hub id.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="How weights are stored: f32, bf16, int8 or int4.")] = "int8",
    mlp_density: Annotated[
        float | None, typer.Option(help="Share of a shape's neurons that is active; 0.1 by default.")
    ] = None,
    input_density: Annotated[
        float | None, typer.Option(help="Share of the inputs of q k v, o and gate that stays; default: all.")
    ] = None,
    threads: Threads = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens before those that are timed.")] = 256,
    against: Annotated[str, typer.Option(help="The other engine: llama.cpp or none.")] = "llama.cpp",
    turns: Turns = 7,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens written in a turn.")] = 32,
    load: Annotated[
        bool, typer.Option("--load", help="Copy our files into huge pages instead of mapping them.")
    ] = False,
    output: Output = None,
    plot: Plot = None,
    json: Json = False,
) -> None:
    """Time decoding, one token at a time: sparse, own dense, llama.cpp and a bandwidth probe in turns."""
    from relufy.bench.decode import bench_decode
    from relufy.bench.options import DecodeOptions
    from relufy.bench.plot import plot_decode

    refuse_outputs(output, plot)
    densities = (mlp_density, input_density)
    options = DecodeOptions(shape, model, dtype, *densities, threads, context, against, turns, tokens, load)
    with ProgressDisplay() as display:
        found = bench_decode(options, display.update)
    if plot:
        plot_decode([found], plot)
    deliver(found, output, json, show_decode)


@app.command("kernels")
def kernels(
    shape: Annotated[str, typer.Option(help="Matrices of this shape's gate.")] = "1.3b",
    dtype: Annotated[
        list[str] | None, typer.Option(help="f32, bf16, int8 or int4; may be repeated; default: all.")
    ] = None,
    threads: Threads = None,
    turns: Turns = 5,
    output: Output = None,
    json: Json = False,
) -> None:
    """Measure each kernel's share of the memory's bandwidth."""
    from relufy.bench.kernels import DTYPES, KernelOptions, bench_kernels

    refuse_outputs(output)
    options = KernelOptions(shape, tuple(dtype or DTYPES), threads, turns)
    with ProgressDisplay() as display:
        found = bench_kernels(options, display.update)
    deliver(found, output, json, show_kernels)


@app.command("plot")
def plot(
    results: Annotated[list[Path], typer.Argument(help="Files that `relufy bench decode` wrote.")],
    plot: Annotated[Path, typer.Option("--plot", help="The drawing: .svg, .png or .pdf.")],
) -> None:
    """Draw the results of several decode benchmarks together."""
    from relufy.bench.plot import plot_decode, read_results

    refuse_outputs(plot=plot)
    plot_decode(read_results(results), plot)
    result(str(plot))


def refuse_outputs(output: Path | None = None, plot: Path | None = None) -> None:
    """Raise, before any long work, if what will be written could not be."""
    from relufy.bench.plot import check_plot_path
    from relufy.files import refuse_occupied

    for path in (output, plot):
        if path is not None:
            refuse_occupied(path, by_folder=False)
    if plot is not None:
        check_plot_path(plot)


def deliver(found: dict[str, Any], output: Path | None, json: bool, show: Callable[[Any], None]) -> None:
    """Write the document to `output`, and print it, or tables of it."""
    from relufy.files import replacing

    if output is not None:
        with replacing(output) as temporary:
            temporary.write_text(dumps(found, indent=2) + "\n")
    if json:
        print_json(found)
    else:
        show(found)
    warn_if_busy(found["machine"])


def warn_if_busy(machine: dict[str, Any]) -> None:
    """Say on stderr if others used the machine meanwhile."""
    if not machine["was_busy"]:
        return
    names = ", ".join(f"{p['process']} {p['cores']:.2f}" for p in machine["other_processes"])
    note(
        f"the machine was busy: others used {machine['other_cores']:.2f} cores ({names or 'not visible'}), "
        f"the hypervisor took {machine['stolen_share']:.1%}; run it again when it is quiet"
    )


def show_decode(found: dict[str, Any]) -> None:
    """Print a decode benchmark's contenders, ratios and checks."""
    from relufy.bench.table import contender_rows, fact_rows

    columns = ["", "tokens/s", "x own dense", "MB a token", "GB/s", "of the probe"]
    print_table(f"decode: {found['label']}", columns, contender_rows(found))
    for name, value in fact_rows(found):
        result(f"{name}: {value}")


def show_kernels(found: dict[str, Any]) -> None:
    """Print a kernel benchmark."""
    rows = [
        [
            f"{row['kernel']} {row['dtype']}",
            f"{row['density']:g}",
            f"{row['gb_per_second']:.1f}",
            f"{row['fraction_of_machine']:.0%}",
        ]
        for row in found["kernels"]
    ]
    title = f"kernels: {found['threads']} threads, probe {found['machine_gb_per_second']:.1f} GB/s"
    print_table(title, ["kernel", "density", "GB/s", "of the probe"], rows)
