"""`relufy predictor`: give a sparse model a predictor of its active neurons, and say how good it is."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relufy.cli.options import Json, Model, OutputFolder
from relufy.cli.output import print_json, print_table, result
from relufy.cli.progress import ProgressDisplay
from relufy.cli.quiet import quiet_libraries

if TYPE_CHECKING:
    from relufy.methods.predictor import PredictorReport

COLUMNS = ("layer", "active", "candidates", "recall", "weighted recall", "precision")
FIGURES = ("active", "density", "recall", "weighted_recall", "precision")


def command(
    model: Model,
    output: OutputFolder,
    text: Annotated[
        list[Path], typer.Option(help="Text to learn from (UTF-8, or .gz); may be repeated. A part reports.")
    ],
    test: Annotated[
        list[Path] | None, typer.Option(help="Text that reports, instead of a fifth of --text.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Products behind the scores of a layer.")] = 256,
    kind: Annotated[
        str,
        typer.Option(
            help="svd: the gate's decomposition where the text's inputs lie. plain_svd: the gate's alone. "
            "trained: from svd on, by gradient descent."
        ),
    ] = "svd",
    recall: Annotated[
        float, typer.Option(help="Share of each layer's active neurons to let through, up to 1.")
    ] = 0.99,
    weighted: Annotated[
        bool, typer.Option("--weighted", help="Of what active neurons put out instead of their number.")
    ] = False,
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 256,
    max_windows: Annotated[int, typer.Option(min=5, help="Windows that are drawn from --text.")] = 400,
    rounds: Annotated[int, typer.Option(min=1, help="Of training, at most.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Of training.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Deals the text out.")] = 0,
    json: Json = False,
) -> None:
    """Store a predictor of active neurons with a checkpoint: for the engine's mode that skips the gate."""
    from relufy.files import refuse_occupied

    refuse_occupied(output, by_folder=True)
    from relufy.measure.prediction.training import Training
    from relufy.methods.predictor import PredictorOptions

    training = Training(rounds=rounds, learning_rate=learning_rate, seed=seed)
    options = PredictorOptions(kind, rank, recall, weighted, training, seed)
    options.definition()
    quiet_libraries()
    report = _run(model, output, text, test, window, max_windows, options)
    if json:
        print_json({"output": str(output), **report.to_json()})
        return
    show(report)
    result(f"{output}: predictor {kind}, rank {rank}, for a recall of {recall:g}")


def _run(
    model: str,
    output: Path,
    text: list[Path],
    test: list[Path] | None,
    window: int,
    max_windows: int,
    options: Any,
) -> "PredictorReport":
    from relufy.methods.predictor import add_predictor, split_text
    from relufy.model.checkpoint import load_model, load_tokenizer, save_checkpoint
    from relufy.text import draw_windows, read_windows, refuse_long_windows

    loaded, tokenizer = load_model(model), load_tokenizer(model)
    refuse_long_windows(window, getattr(loaded.config, "max_position_embeddings", None), "; give --window")
    windows = draw_windows(read_windows(text, tokenizer, window), max_windows, options.seed)
    held_out = None
    if test:
        held_out = draw_windows(read_windows(test, tokenizer, window), max_windows, options.seed)
    with ProgressDisplay() as display:
        report = add_predictor(loaded, split_text(windows, options.seed, held_out), options, display.update)
    save_checkpoint(loaded, tokenizer, output)
    return report


def show(report: "PredictorReport") -> None:
    """Print each layer's figures, the change of perplexity, and the size, with what they mean."""
    from relufy.methods.predictor import DEFINITIONS

    rows = [
        [str(index), *(f"{getattr(quality, name):.2%}" for name in FIGURES)]
        for index, quality in report.layers.items()
    ]
    rows.append(["mean", *(f"{report.mean(name):.2%}" for name in FIGURES)])
    print_table(f"predictor, on {report.tokens:,} held-out tokens", list(COLUMNS), rows)
    error = report.difference_error * report.predicted.perplexity
    result(
        f"perplexity {report.exact.perplexity:.3f}, predicted {report.predicted.perplexity:.3f} "
        f"\u00b1 {error:.3f} ({report.perplexity_change:+.2%})"
    )
    share = report.parameters / report.gate_parameters
    result(f"weights of the predictor: {share:.1%} of the gate's, {report.parameters:,} a layer")
    for name, meaning in DEFINITIONS.items():
        result(f"{name}: {meaning}")
