"""`relufy compare`: every training-free method under one protocol, in one table."""

from json import dumps
from pathlib import Path
from shlex import join
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relufy.cli.options import Json, Model, Threads
from relufy.cli.output import note, print_json, print_table, result
from relufy.cli.progress import ProgressDisplay
from relufy.cli.quiet import quiet_libraries
from relufy.errors import UserError

if TYPE_CHECKING:
    from relufy.methods.comparison import Comparison

METHODS = "teal,cats,chess,wina,rsparse,scap"
TARGETS = "0.25,0.4,0.5,0.65"


def command(
    model: Model,
    text: Annotated[
        list[Path], typer.Option(help="A text file to measure on (UTF-8, or .gz); may be repeated.")
    ],
    calibration: Annotated[
        list[Path], typer.Option(help="A text file to calibrate on, another one; may be repeated.")
    ],
    methods: Annotated[str, typer.Option(help="Methods, with commas between them.")] = METHODS,
    targets: Annotated[
        str, typer.Option(help="Shares of the blocks' linear weights that are not read, with commas.")
    ] = TARGETS,
    own_targets: Annotated[
        bool, typer.Option("--own-targets", help="Targets are what each paper calls its sparsity.")
    ] = False,
    mode: Annotated[
        str, typer.Option(help="Tokens that are sparsified and scored: all, second-half or decode.")
    ] = "all",
    window: Annotated[int, typer.Option(min=4, help="Tokens in a window, of both texts.")] = 256,
    max_windows: Annotated[
        int | None, typer.Option(min=1, help="Measure no more than the first windows.")
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(min=1, help="Positions to calibrate on; 20,480 by default.")
    ] = None,
    assign: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="METHOD.KEY=VALUE",
            help="Another value for a method, as teal.allocation=uniform.",
        ),
    ] = None,
    no_controls: Annotated[
        bool, typer.Option("--no-controls", help="Leave out the random and the oracle masks.")
    ] = False,
    speed: Annotated[
        int, typer.Option(min=0, metavar="TOKENS", help="Also decode so many tokens on the engine, in turns.")
    ] = 0,
    threads: Threads = None,
    dtype: Annotated[
        str, typer.Option(help="The engine's weights, for bytes and speed: f32, bf16, int8 or int4.")
    ] = "f32",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the calibration windows and random masks.")] = 0,
    allow_same_text: Annotated[
        bool, typer.Option("--allow-same-text", help="Accept one file for both texts.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A new folder for the JSON, Markdown and plots.")
    ] = None,
    json: Json = False,
) -> None:
    """Compare training-free methods at equal sparsity: quality, controls, costs."""
    from relufy.files import refuse_occupied
    from relufy.method import Calibration
    from relufy.methods.compare import CompareOptions, compare

    names, shares = parts(methods), numbers(targets)
    if output is not None:
        import matplotlib  # noqa: F401  (missing? say so before the work)

        refuse_occupied(output, by_folder=True)
    options = CompareOptions(
        mode=mode,
        own_targets=own_targets,
        window=window,
        max_windows=max_windows,
        calibrate=Calibration(tokens=calibration_tokens or Calibration.tokens, window=window, seed=seed),
        has_controls=not no_controls,
        speed_tokens=speed,
        threads=threads,
        dtype=dtype,
        seed=seed,
        allow_same_text=allow_same_text,
        changes=changed_values(assign or []),
    )
    quiet_libraries()
    said = command_line(model, names, shares, text, calibration, options)
    with ProgressDisplay() as display:
        found = compare(model, names, shares, text, calibration, options, display.update, said)
    deliver(found, output, json)


def parts(text: str) -> list[str]:
    """Read names with commas between them."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str) -> list[float]:
    """Read numbers with commas between them. Raises UserError."""
    try:
        return [float(part) for part in parts(text)]
    except ValueError:
        raise UserError(f"--targets takes shares with commas, such as {TARGETS}, found {text!r}") from None


def changed_values(assignments: list[str]) -> dict[str, dict[str, Any]]:
    """Return values by method and key of `METHOD.KEY=VALUE` entries; a value is YAML. Raises UserError."""
    from relufy.schema import yaml_value

    found: dict[str, dict[str, Any]] = {}
    for assignment in assignments:
        place, equals, value = assignment.partition("=")
        method, dot, key = place.strip().partition(".")
        if not (equals and dot and key):
            raise UserError(f"--set takes METHOD.KEY=VALUE, as teal.allocation=uniform, found {assignment!r}")
        found.setdefault(method, {})[key] = yaml_value(value, assignment)
    return found


def command_line(
    model: str,
    methods: list[str],
    targets: list[float],
    text: list[Path],
    calibration: list[Path],
    options: Any,
) -> str:
    """Return the command that repeats a comparison."""
    words = ["relufy", "compare", model, "--methods", ",".join(methods)]
    words += ["--targets", ",".join(f"{target:g}" for target in targets)]
    words += [word for path in text for word in ("--text", str(path))]
    words += [word for path in calibration for word in ("--calibration", str(path))]
    values = {
        "--mode": options.mode,
        "--window": options.window,
        "--max-windows": options.max_windows,
        "--calibration-tokens": options.calibrate.tokens,
        "--speed": options.speed_tokens or None,
        "--threads": options.threads,
        "--dtype": options.dtype,
        "--seed": options.seed,
    }
    flags = {
        "--own-targets": options.own_targets,
        "--no-controls": not options.has_controls,
        "--allow-same-text": options.allow_same_text,
    }
    for method, changes in options.changes.items():
        words += [word for key, value in changes.items() for word in ("--set", f"{method}.{key}={value}")]
    words += [word for name, value in values.items() if value is not None for word in (name, str(value))]
    return join([*words, *(name for name, is_set in flags.items() if is_set)])


def deliver(found: "Comparison", output: Path | None, json: bool) -> None:
    """Write the folder, and print the document or the tables."""
    document = found.to_json()
    if output is not None:
        write_folder(found, document, output)
    if json:
        print_json(document)
    else:
        show(found)
    if output is not None:
        note(f"{output}: compare.json, compare.md, compare.png, compare.svg")


def write_folder(found: "Comparison", document: dict[str, Any], output: Path) -> None:
    """Write JSON, Markdown and plots to a new folder, whole or not at all."""
    from relufy.files import replacing
    from relufy.report.comparison import plot_comparison

    with replacing(output) as folder:
        folder.mkdir()
        (folder / "compare.json").write_text(dumps(document, indent=2, allow_nan=False) + "\n")
        (folder / "compare.md").write_text(found.to_markdown() + "\n![perplexity](compare.png)\n")
        for name in ("compare.png", "compare.svg"):
            plot_comparison(document, folder / name)


def show(found: "Comparison") -> None:
    """Print the tables, and what belongs beside them."""
    from relufy.methods.comparison import MEANINGS
    from relufy.methods.comparison_tables import remarks, tables

    result(f"{found.model}: {found.windows} windows of {found.window} tokens")
    for table in tables(found):
        print_table(table.title, [column.replace("_", " ") for column in table.columns], table.rows)
    for line in remarks(found):
        result(f"note: {line}")
    for name, meaning in MEANINGS.items():
        result(f"{name}: {meaning}")
