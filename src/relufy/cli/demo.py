"""`relufy demo`: the whole road on one model, shown as it goes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from relufy.cli.options import Json
from relufy.cli.output import print_json, print_table, stderr, stdout
from relufy.cli.progress import ProgressDisplay
from relufy.cli.quiet import quiet_libraries

if TYPE_CHECKING:
    from relufy.demo.result import DemoResult, Estimate, Variant


def command(
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")] = Path(
        "relufy-demo"
    ),
    text: Annotated[
        Path | None, typer.Option(help="Train and test on parts of this file: real quality.")
    ] = None,
    model: Annotated[str, typer.Option(help="Another dense model: a folder or a hub id.")] = "bundled",
    prompt: Annotated[str | None, typer.Option(help="The text that each model continues.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Fine-tuning steps per stage.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak rate; the default suits small models.")
    ] = None,
    json: Json = False,
) -> None:
    """Relufy a model twice, fine-tune, measure, run it, and write a report."""
    from relufy.demo.options import PROMPT, DemoOptions
    from relufy.demo.run import run_demo

    quiet_libraries()
    console = stderr if json else stdout
    options = DemoOptions(output, model, text, prompt or PROMPT, steps, learning_rate)
    with ProgressDisplay() as display:
        result = run_demo(options, Narrator(console, display))
    if json:
        print_json(result.to_json())
    else:
        show(result, console)
        console.print(f"\nreport: {output / 'report.html'}", markup=False, soft_wrap=True)


class Narrator:
    """Shows the demo's steps on a console, and their progress on stderr."""

    def __init__(self, console: Console, display: ProgressDisplay) -> None:
        self._console = console
        self.progress = display.update

    def step(self, title: str, command: str | None = None) -> None:
        self._console.print(f"\n[bold]{title}[/bold]")
        if command:
            self._console.print(f"$ {command}", style="cyan", markup=False, soft_wrap=True)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=False)


def show(result: "DemoResult", console: Console) -> None:
    """Print the demo's table, its targets and the generated texts."""
    console.print()
    columns = ["", *(variant.name for variant in result.variants)]
    print_table("What a token costs, and what that cost in fidelity", columns, table_rows(result), console)
    for target in result.targets():
        verdict = "reached" if target["met"] else "NOT reached"
        console.print(
            f"{target['name']}: {target['reached']:.1%} of the KL that the bare swap opened is closed; "
            f"the target of {target['target']:.0%} is {verdict}"
        )
    console.print(f"\n[bold]{len(result.variants)} continuations of the same prompt[/bold]")
    for variant in result.variants:
        console.print(f"[bold]{variant.name}:[/bold] ", end="")
        console.print(f"{result.prompt}{variant.text}", markup=False)


def table_rows(result: "DemoResult") -> list[list[str]]:
    """Return the demo's table: one row a figure, one column a variant."""

    def row(name: str, cells: list[str]) -> list[str]:
        return [name, *cells]

    variants = result.variants
    rows = [
        row(
            "bytes_engine a token",
            [f"{v.cost.bytes_engine / 1e6:.2f} MB" if v.cost else "" for v in variants],
        ),
        row("speed bound from the bytes", [f"{result.bound(v) or 0:.2f}x" for v in variants]),
        row("macs_paper a token", [f"{v.cost.macs_paper / 1e6:.2f} M" if v.cost else "" for v in variants]),
        row(
            "tokens/s (fits in the cache)" if result.fits_in_cache else "tokens/s",
            [f"{v.median_tokens_per_second or 0:.0f}" for v in variants],
        ),
        row("KL to dense, bare swap", [_estimate(v.kl_before) for v in variants]),
        row("KL to dense, fine-tuned", [_estimate(v.kl) for v in variants]),
    ]
    if result.targets():
        rows += [
            row("KL closed", [_estimate(v.kl_drop) for v in variants]),
            row("share closed", ["" if v.kl_closed is None else f"{v.kl_closed:.1%}" for v in variants]),
        ]
    if variants[0].perplexity_before:
        rows += [
            row("perplexity, not fine-tuned", [_estimate(v.perplexity_before, 2) for v in variants]),
            row("perplexity, fine-tuned", [_estimate(v.perplexity, 2) for v in variants]),
            row("perplexity, dense control", [_estimate(v.control, 2) for v in variants]),
        ]
    for sites in result.sparse_sites():
        rows.append(row(f"sparsity of {', '.join(sites)}", [_mean(v, sites[0]) for v in variants]))
    return rows


def _mean(variant: "Variant", site: str) -> str:
    shares = variant.sparsity.get(site)
    return f"{sum(shares) / len(shares):.1%}" if shares else ""


def _estimate(estimate: "Estimate | None", digits: int = 4) -> str:
    return f"{estimate.value:.{digits}f} \u00b1 {estimate.standard_error:.{digits}f}" if estimate else ""
