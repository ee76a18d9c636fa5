"""`relufy bench`: measured speed, beside named baselines in the same run."""

from collections.abc import Callable
from functools import partial
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from relufy.cli.options import (
    Json,
    NoMmap,
    ReusePeriod,
    ReusePolicyName,
    ReuseWindow,
    Threads,
    parse_reuse,
)
from relufy.cli.output import note, print_json, print_table, result
from relufy.cli.progress import ProgressDisplay
from relufy.errors import UserError

app = typer.Typer(help="Measure speed: beside our own dense pack, llama.cpp, and the memory itself.")

Shape = Annotated[
    str | None, typer.Option("--shape", help="Random weights of this shape: 1.3b, 7b, or tiny (for tests).")
]
RealModel = Annotated[
    str | None,
    typer.Option("--model", help="A real model instead: a checkpoint folder, 'bundled', or a hub id."),
]
Dtype = Annotated[str, typer.Option("--dtype", help="How weights are stored: f32, bf16, int8 or int4.")]
MlpDensity = Annotated[
    float | None,
    typer.Option("--mlp-density", help="Share of a shape's neurons that is active; 0.1 by default."),
]
InputDensity = Annotated[
    float | None,
    typer.Option(
        "--input-density", help="Share of the inputs of q k v, o and gate that stays; default: all."
    ),
]
Against = Annotated[str, typer.Option("--against", help="The other engine: llama.cpp or none.")]
Turns = Annotated[int, typer.Option("--turns", min=1, help="Timed turns of each, after a warm-up.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="Write the JSON document to this file.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw the result: .svg, .png or .pdf.")]


@app.command("decode")
def decode(
    shape: Shape = None,
    model: RealModel = None,
    dtype: Dtype = "int8",
    mlp_density: MlpDensity = None,
    input_density: InputDensity = None,
    threads: Threads = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens before those that are timed.")] = 256,
    against: Against = "llama.cpp",
    turns: Turns = 7,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens written in a turn.")] = 32,
    reuse: ReusePeriod = None,
    reuse_window: ReuseWindow = None,
    reuse_policy: ReusePolicyName = None,
    window_union: Annotated[
        float | None,
        typer.Option("--window-union", help="Share of a shape's neurons that is ever active; default: all."),
    ] = None,
    predictor: Annotated[
        str | None,
        typer.Option(metavar="rank=N|on", help="Skip gates: a shape's random predictor, or a model's own."),
    ] = None,
    candidate_density: Annotated[
        float | None,
        typer.Option(
            "--candidate-density",
            help="Share of a shape's neurons that its predictor names, all active ones with them; 0.15.",
        ),
    ] = None,
    no_mmap: NoMmap = False,
    output: Output = None,
    plot: Plot = None,
    json: Json = False,
) -> None:
    """Time decoding, one token at a time: sparse, own dense, llama.cpp and a bandwidth probe in turns."""
    from relufy.bench.decode import bench_decode
    from relufy.bench.options import DecodeOptions

    options = DecodeOptions(
        shape=shape,
        model=model,
        dtype=dtype,
        mlp_density=mlp_density,
        input_density=input_density,
        threads=threads,
        context=context,
        against=against,
        turns=turns,
        tokens=tokens,
        load=no_mmap,
        reuse=parse_reuse(reuse, reuse_window, reuse_policy),
        window_union=window_union,
        predictor=rank_of(predictor),
        candidate_density=candidate_density,
    )
    run(partial(bench_decode, options), output, plot, json)


@app.command("prefill")
def prefill(
    shape: Shape = None,
    model: RealModel = None,
    dtype: Dtype = "int8",
    mlp_density: MlpDensity = None,
    input_density: InputDensity = None,
    threads: Threads = None,
    against: Against = "llama.cpp",
    turns: Turns = 5,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    no_mmap: NoMmap = False,
    output: Output = None,
    plot: Plot = None,
    json: Json = False,
) -> None:
    """Time reading a prompt: sparse, own dense and llama.cpp (llama-bench's pp) in turns."""
    from relufy.bench.options import PrefillOptions
    from relufy.bench.prefill import bench_prefill

    options = PrefillOptions(
        shape=shape,
        model=model,
        dtype=dtype,
        mlp_density=mlp_density,
        input_density=input_density,
        threads=threads,
        against=against,
        turns=turns,
        tokens=tokens,
        load=no_mmap,
    )
    run(partial(bench_prefill, options), output, plot, json)


@app.command("batch")
def batch(
    shape: Shape = None,
    model: RealModel = None,
    dtype: Dtype = "int8",
    mlp_density: MlpDensity = None,
    input_density: InputDensity = None,
    threads: Threads = None,
    sizes: Annotated[
        str, typer.Option("--batch", help="Numbers of sequences, with commas between them.")
    ] = "1,2,4,8,16",
    context: Annotated[int, typer.Option(min=1, help="Tokens of each sequence before the timed ones.")] = 256,
    against: Against = "llama.cpp",
    turns: Turns = 5,
    tokens: Annotated[int, typer.Option(min=1, help="Steps of a turn.")] = 16,
    no_mmap: NoMmap = False,
    output: Output = None,
    plot: Plot = None,
    json: Json = False,
) -> None:
    """Time steps of several sequences at once: sparse, own dense and llama.cpp in turns."""
    from relufy.bench.batch import bench_batch
    from relufy.bench.options import BatchOptions

    options = BatchOptions(
        shape=shape,
        model=model,
        dtype=dtype,
        mlp_density=mlp_density,
        input_density=input_density,
        threads=threads,
        batch=numbers(sizes),
        context=context,
        against=against,
        turns=turns,
        tokens=tokens,
        load=no_mmap,
    )
    run(partial(bench_batch, options), output, plot, json)


@app.command("speculative")
def speculative(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, 'bundled', or a hub id.")],
    draft: Annotated[
        str,
        typer.Option("--draft", "--speculative", help="A smaller model of the same vocabulary, or lookup."),
    ],
    text: Annotated[str, typer.Option("--text", help="Passages of this text are continued.")],
    gammas: Annotated[
        str, typer.Option("--gammas", help="Tokens drafted at a time, with commas.")
    ] = "2,4,8,16",
    dtype: Dtype = "int8",
    threads: Threads = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a passage.")] = 128,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens written in a turn.")] = 96,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 writes the likeliest token.")] = 0.0,
    turns: Turns = 7,
    no_mmap: NoMmap = False,
    output: Output = None,
    json: Json = False,
) -> None:
    """Time speculative decoding: sparse and own dense, plainly and at each gamma; theory beside it."""
    from relufy.bench.options import SpeculativeOptions
    from relufy.bench.speculative import bench_speculative

    options = SpeculativeOptions(
        model=model,
        draft=draft,
        text=text,
        gammas=numbers(gammas, "--gammas"),
        dtype=dtype,
        threads=threads,
        context=context,
        tokens=tokens,
        temperature=temperature,
        turns=turns,
        load=no_mmap,
    )
    run(partial(bench_speculative, options), output, None, json)


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

    options = KernelOptions(shape, tuple(dtype or DTYPES), threads, turns)
    run(partial(bench_kernels, options), output, None, json)


@app.command("crossover")
def crossover(
    threads: Threads = None,
    again: Annotated[bool, typer.Option("--again", help="Measure it though it was measured before.")] = False,
    output: Output = None,
    json: Json = False,
) -> None:
    """Show from which share of rows on the engine reads all of them: measured once on this machine."""
    from relufy.bench.crossover import bench_crossover

    run(partial(bench_crossover, threads, again), output, None, json)


@app.command("measure")
def measure(
    model: Annotated[
        str, typer.Option("--model", help="A checkpoint folder, 'bundled', or a hub id.")
    ] = "bundled",
    shape: Shape = None,
    stage: Annotated[
        int, typer.Option(min=0, max=2, help="Relufy the model in memory to this stage; 0: leave it.")
    ] = 2,
    windows: Annotated[int, typer.Option(min=1, help="Windows of random tokens in a turn.")] = 16,
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 256,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Windows that run together.")] = 16,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    turns: Turns = 5,
    output: Output = None,
    json: Json = False,
) -> None:
    """Time the default metrics of `relufy measure` beside plain forward passes."""
    from relufy.bench.overhead import OverheadOptions, bench_overhead

    options = OverheadOptions(model, shape, stage, windows, window, batch_size, turns, device)
    run(partial(bench_overhead, options), output, None, json)


@app.command("plot")
def plot(
    results: Annotated[list[Path], typer.Argument(help="Files that `relufy bench ... -o` wrote.")],
    plot: Annotated[Path, typer.Option("--plot", help="The drawing: .svg, .png or .pdf.")],
) -> None:
    """Draw the results of several benchmarks together."""
    from relufy.bench.plot import plot_results, read_results

    refuse_outputs(plot=plot)
    plot_results(read_results(results), plot)
    result(str(plot))


def rank_of(predictor: str | None) -> int | None:
    """Return N of `rank=N`, 0 for `on`. Raises UserError for anything else."""
    if predictor in (None, "on"):
        return None if predictor is None else 0
    name, _, rank = predictor.partition("=")
    if name != "rank" or not rank.isdecimal() or int(rank) < 1:
        raise UserError(f"--predictor takes rank=N, or on, found {predictor!r}")
    return int(rank)


def numbers(text: str, option: str = "--batch") -> tuple[int, ...]:
    """Read whole numbers with commas between them. Raises UserError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} takes whole numbers, such as 1,2,4, found {text!r}") from None


def refuse_outputs(output: Path | None = None, plot: Path | None = None) -> None:
    """Raise, before any long work, if what will be written could not be."""
    from relufy.bench.plot import check_plot_path
    from relufy.files import refuse_occupied

    for path in (output, plot):
        if path is not None:
            refuse_occupied(path, by_folder=False)
    if plot is not None:
        check_plot_path(plot)


def run(
    bench: Callable[[Callable[[str, int, int], None]], dict[str, Any]],
    output: Path | None,
    plot: Path | None,
    json: bool,
) -> None:
    """Run a benchmark, which is called with where to report progress, and deliver what it found."""
    refuse_outputs(output, plot)
    with ProgressDisplay() as display:
        found = bench(display.update)
    deliver(found, output, plot, json)


def deliver(found: dict[str, Any], output: Path | None, plot: Path | None, json: bool) -> None:
    """Write the document to `output`, draw it, and print it, or a table of it."""
    from relufy.bench.plot import plot_results
    from relufy.bench.table import show
    from relufy.files import replacing

    if output is not None:
        with replacing(output) as temporary:
            temporary.write_text(dumps(found, indent=2) + "\n")
    if plot is not None:
        plot_results([found], plot)
    if json:
        print_json(found)
    else:
        shown = show(found)
        print_table(shown.title, shown.columns, shown.rows)
        for name, value in shown.facts:
            result(f"{name}: {value}")
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
