"""A model ten times as large: from scratch, dense and with 90 % zeros, and relufied afterwards."""

import math
from pathlib import Path
from typing import Any

from studies.figure import INKS, figure
from studies.job import Job
from studies.plans import EPOCH, SHORT, STAGE1, Done, are_done, best_rate, by_muon, held, progressive, shifted
from studies.summary import compared

EPOCHS = 3
BATCH = 128
RATES = (3e-3, 6e-3)
RELUFY_RATES = (2e-3, 4e-3)
SCRATCH: dict[str, tuple[str, float | None]] = {
    "silu": ("silu", None),
    "relu-0.9": ("relu", 0.9),
    "relu": ("relu", None),
    "relu-0.95": ("relu", 0.95),
}
RELUFIED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "control": ({}, {}),
    "stage1": (STAGE1, {}),
    "shifted-0.9": (shifted(0.9), {"penalty": held(0.9)}),
}


def plan(done: Done) -> list[Job]:
    """Return the trainings from scratch; those of the better SiLU model, relufied."""
    jobs = [scratch(name, rate) for name in SCRATCH for rate in RATES]
    grid = [scratch("silu", rate) for rate in RATES]
    if are_done(grid, done):
        start = scratch("silu", best_rate(lambda rate, _: scratch("silu", rate), RATES, done)).name
        jobs += [relufied(name, start, rate) for name in RELUFIED for rate in RELUFY_RATES]
    return jobs


def scratch(name: str, rate: float) -> Job:
    """Return one training from scratch."""
    activation, target = SCRATCH[name]
    changes: dict[str, Any] = {} if target is None else {"penalty": progressive(target)}
    return Job(
        f"large-{name}-{rate:g}",
        shape="30m",
        activation=activation,
        finetune=by_muon(
            EPOCHS * EPOCH // 2, rate, batch_size=BATCH, schedule="wsd", precision="bf16", **changes
        ),
        keep=name == "silu",
    )


def relufied(name: str, start: str, rate: float) -> Job:
    """Return one fine-tune of the dense model, as it is or relufied."""
    sparsify, changes = RELUFIED[name]
    return Job(
        f"large-{name}-of-silu-{rate:g}",
        start=f"job:{start}",
        sparsify=sparsify,
        finetune=by_muon(SHORT // 2, rate, batch_size=BATCH, precision="bf16", **changes),
        keep=name.startswith("shifted"),
    )


def is_part(name: str) -> bool:
    """Return whether a job's result belongs to the report."""
    return name.startswith("large-")


NAMES = {
    "silu": "SiLU, dense",
    "relu": "ReLU",
    "relu-0.9": "ReLU, penalty to 90 %",
    "relu-0.95": "ReLU, penalty to 95 %",
    "control": "dense, trained on",
    "stage1": "stage 1",
    "shifted-0.9": "shift to 90 %, held",
}


def arms(done: Done) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return the results at the better rate: from scratch, and of the relufied SiLU model."""
    start = scratch("silu", best_rate(lambda rate, _: scratch("silu", rate), RATES, done)).name
    trained = {
        n: done[scratch(n, best_rate(lambda r, _, n=n: scratch(n, r), RATES, done)).name] for n in SCRATCH
    }
    relufied_ones = {
        n: done[
            relufied(n, start, best_rate(lambda r, _, n=n: relufied(n, start, r), RELUFY_RATES, done)).name
        ]
        for n in RELUFIED
    }
    return trained, relufied_ones


def tables(done: Done) -> str:
    """Return the tables of the document."""
    return "\n".join(
        compared([(NAMES[name], result) for name, result in results.items()]) for results in arms(done)
    )


def draw(done: Done, file: Path) -> None:
    """Draw the validation loss over tokens, from scratch; and what zeros cost in the end."""
    trained, relufied_ones = arms(done)
    with figure(file) as (left, right):
        for (name, result), ink in zip(trained.items(), INKS, strict=False):
            left.plot(
                *zip(*((t / 1e6, loss) for t, loss in result["checks"]), strict=True),
                color=ink,
                label=NAMES[name],
            )
        left.set(xlabel="million tokens", ylabel="validation loss, nats per token")
        left.legend(fontsize=8)
        for results, base, ink, label in (
            (trained, "silu", INKS[1], "from scratch, against SiLU"),
            (relufied_ones, "control", INKS[3], "relufied, against the control"),
        ):
            zeros = [100 * result["final"]["sparsity"]["neuron"] for result in results.values()]
            base_loss = results[base]["final"]["nats"]
            costs = [100 * (math.exp(result["final"]["nats"] - base_loss) - 1) for result in results.values()]
            right.plot(zeros, costs, "o", color=ink, label=label)
        right.axhline(0, color="#999999", linewidth=0.8)
        right.set(xlabel="% of neurons that are zero", ylabel="% more perplexity")
        right.legend(fontsize=8)
