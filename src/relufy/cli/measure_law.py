"""`relufy measure law`: the law of a training run's activation ratio, from its log."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relufy.cli.options import Json
from relufy.cli.output import print_json, print_table, result
from relufy.errors import UserError

if TYPE_CHECKING:
    from relufy.measure.laws import LawFit

FORMULAS = {
    "falling": "A(D) = exp(-c D^alpha + b) + limit",
    "rising": "A(D) = limit - c / D^alpha",
}


def command(
    run: Annotated[Path, typer.Argument(help="A training run's folder (made with --log), or its log.jsonl.")],
    site: Annotated[str, typer.Option(help="Whose sparsity: neuron, down or an input.")] = "neuron",
    skip: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Leave out the first share of the training.")
    ] = 0.1,
    average: Annotated[int, typer.Option(min=1, help="Reports that are averaged into one point.")] = 5,
    json: Json = False,
) -> None:
    """Fit the laws of activation over training tokens (Sparsing Law) to a run's log."""
    from relufy.document import heading
    from relufy.measure.laws import LAWS, fit_law, points_of
    from relufy.train.logbook import LOG_FILE, read_log

    path = run / LOG_FILE if run.is_dir() else run
    if not path.is_file():
        raise UserError(f"there is no log {path}; train with --log")
    tokens, active = points_of(read_log(path), site, skip, average)
    fits = [fit_law(tokens, active, name) for name in LAWS]
    if json:
        points: dict[str, Any] = {"run": str(run), "site": site, "tokens_1e9": tokens, "active": active}
        found = {"laws": [_plain(fit) for fit in fits], "definitions": FORMULAS | {"unit": "D in 1e9 tokens"}}
        print_json(heading("relufy.measure.law") | points | found)
        return
    _show(fits, len(tokens))


def _plain(fit: "LawFit") -> dict[str, Any]:
    from dataclasses import asdict

    return {"name": fit.name, "formula": FORMULAS[fit.name], "error": fit.error, **asdict(fit.law)}


def _show(fits: list["LawFit"], points: int) -> None:
    rows = [
        [
            fit.name,
            f"{fit.error:.5f}",
            f"{fit.law.limit:.4f}",
            ", ".join(f"{name} {value:.4g}" for name, value in vars(fit.law).items() if name != "limit"),
        ]
        for fit in fits
    ]
    title = f"activation ratio over D, 1e9 tokens; {points} points"
    print_table(title, ["law", "error (rms)", "limit", "other coefficients"], rows)
    for name, formula in FORMULAS.items():
        result(f"{name}: {formula}")
