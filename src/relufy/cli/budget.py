"""`relufy sparsify --budget`: the masks that save most while the perplexity stays within it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relufy.cli.calibration import calibration_windows
from relufy.cli.output import note, print_json, print_table, result
from relufy.cli.progress import ProgressDisplay
from relufy.cli.quiet import quiet_libraries

if TYPE_CHECKING:
    from relufy.methods.auto import Search
    from relufy.methods.budget.frontier import Point
    from relufy.methods.budget.speed import ReadingSpeeds
    from relufy.methods.budget.texts import Texts


@dataclass(frozen=True)
class BudgetOptions:
    """What the command takes. Files may be "self": the model writes that text."""

    budget: str
    text: Sequence[str]
    """One stream that is dealt out to calibration, selection and test; or the calibration text alone."""
    selection: Sequence[str] = ()
    test: Sequence[str] = ()
    minutes: float = 10.0
    dtype: str = "f32"
    seed: int = 0
    window: int = 256
    windows: int = 240
    """Windows of all three texts together, at most."""
    threads: int | None = None
    measure: bool = True
    """False takes the table of reading speeds instead of measuring this machine."""
    plot: Path | None = None
    json: bool = False


def run(model: str, output: Path, options: BudgetOptions) -> None:
    """Search, save what was found, and print the frontier; refuse early what would fail late."""
    from relufy.engine.pack import check_choice
    from relufy.errors import UserError
    from relufy.files import refuse_occupied
    from relufy.hub import model_folder
    from relufy.method import Auto
    from relufy.methods.budget.bound import parse_budget

    budget = parse_budget(options.budget)
    method = Auto(budget=budget, minutes=options.minutes, seed=options.seed, dtype=options.dtype)
    check_choice(options.dtype, "exact")
    if not options.text:
        raise UserError("--budget needs text to search on: --calibration FILE, or --calibration self")
    if bool(options.selection) != bool(options.test):
        raise UserError(
            "give --selection and --test both, or neither: then one text is dealt out to all three"
        )
    folder = model_folder(model)
    refuse_occupied(output, by_folder=True)
    if options.plot:
        from relufy.bench.plot import check_plot_path

        check_plot_path(options.plot)

    from relufy.methods.auto import search
    from relufy.methods.sparsify import install
    from relufy.model.checkpoint import load_model, load_tokenizer, save_checkpoint
    from relufy.model.empty import refuse_without_sites

    quiet_libraries()
    refuse_without_sites(folder)
    loaded, tokenizer = load_model(folder), load_tokenizer(folder)
    with ProgressDisplay() as display:
        texts = read_texts(options, loaded, tokenizer, display)
        speeds = reading_speeds(options, loaded.config, display)
        found = search(loaded, texts, method, speeds, progress=display.update)
    sparse = install(found.setting, found.recipe, found.found)
    files = {name: [Path(f).name for f in getattr(options, name)] for name in ("text", "selection", "test")}
    save_checkpoint(sparse, tokenizer, output, found.provenance() | {"files": files})
    if options.plot:
        from relufy.report.frontier import plot_frontier

        plot_frontier(found, options.plot)
    if options.json:
        print_json({"output": str(output)} | found.to_json())
        return
    show(found, output)


def read_texts(options: BudgetOptions, model: Any, tokenizer: Any, display: ProgressDisplay) -> "Texts":
    """Return the three texts. Raises UserError for unfit files."""
    from relufy.method import Calibration
    from relufy.methods.budget.texts import SHARES, Texts, split

    def windows(files: Sequence[str], count: float) -> Any:
        wanted = Calibration(
            tokens=int(max(1, count)) * options.window, window=options.window, seed=options.seed
        )
        return calibration_windows(list(files), model, tokenizer, wanted, display)

    if not options.selection:
        return split(windows(options.text, options.windows), options.seed)
    files = dict(zip(SHARES, (options.text, options.selection, options.test), strict=True))
    return Texts(*(windows(files[name], options.windows * share) for name, share in SHARES.items()))


def reading_speeds(options: BudgetOptions, config: Any, display: ProgressDisplay) -> "ReadingSpeeds":
    """Return this machine's reading speeds, or the table where they cannot be measured, and say so."""
    from relufy.bench.lock import bench_lock
    from relufy.engine.cpu import usable_cores
    from relufy.engine.spec import decoder_spec
    from relufy.errors import UserError
    from relufy.methods.budget.speed import TABLE, measured_speeds

    spec = decoder_spec(config.to_dict())
    if not options.measure:
        return TABLE
    try:
        with bench_lock():
            return measured_speeds(
                options.dtype,
                spec.hidden_size,
                spec.intermediate_size,
                options.threads or usable_cores(),
                display.update,
            )
    except UserError as error:
        note(f"reading speeds are those of a table, not of this machine: {error}")
        return TABLE


def show(found: "Search", output: Path) -> None:
    """Print the frontier, what was chosen, and how good it is on the test text."""
    report = found.report
    print_table(
        "the best of each method within the budget, and what was refused",
        ["", "parameter", "bytes saved", "time saved", "ppl rise", "95 % bound", "points (refused)"],
        list(_rows(found)),
    )
    for untried in report.untried:
        note(f"{untried.method}: not tried to its end: {untried.reason}")
    if not report.is_complete:
        note("the minutes were over before the search converged; more may find more")
    chosen, single = report.chosen, report.best_single
    beside = f"; the best single method, {single.method}, saves {single.bytes_saved:.2%}" if single else ""
    result(f"{output}: {chosen.method}, {chosen.bytes_saved:.2%} of a token's bytes saved{beside}")
    result(
        f"predicted speed: {report.dense.seconds / chosen.seconds:.3f}x that of the dense model "
        f"(reading speeds: {report.speeds.source}; {report.speeds.stream:.1f} GB/s as a stream)"
    )
    if chosen.time_saved <= 0:
        note("no masks within the budget should make this machine's engine faster; these save most bytes")
    rise = report.test
    result(
        f"test text: perplexity {report.test_dense_perplexity:.3f} -> {report.test_perplexity:.3f}, "
        f"{rise.nats:+.2%} +- {rise.standard_error:.2%} (of {rise.windows} windows that decided nothing)"
    )


def _rows(found: "Search") -> Any:
    for method in dict.fromkeys(point.method for point in found.frontier):
        points = [point for point in found.frontier if point.method == method]
        accepted = [point for point in points if point.is_accepted]
        best = min(accepted, key=lambda point: point.bytes, default=None)
        counts = f"{len(points)} ({len(points) - len(accepted)})"
        yield [method, *(_figures(best) if best else ["-"] * 5), counts]


def _figures(point: "Point") -> list[str]:
    return [
        f"{point.parameter:.3g}",
        f"{point.bytes_saved:.2%}",
        f"{point.time_saved:.2%}",
        f"{point.nats:.2%}",
        f"{point.bound:.2%}",
    ]
