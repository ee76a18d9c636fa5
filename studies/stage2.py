"""What stage 2 saves: zeros at the inputs and at the neurons, in multiply-accumulates of the paper."""

import math
from pathlib import Path
from typing import Any

from studies import prosparse
from studies.figure import INKS, figure
from studies.job import Job
from studies.plans import EPOCH, STAGE2, Done, best_rate, by_muon, held
from studies.summary import Seeds, nats, perplexity, share, table

RATES = (5e-3, 1e-2)
NEURONS = 0.9
INPUTS = (0.5, 0.55, 0.6, 0.65)
"""Shares of zeros wanted at the inputs of q k v, gate and up."""


def plan(done: Done) -> list[Job]:
    """Return stage 2 with penalties at neurons and inputs, and the control (of prosparse.py)."""
    sparse = [arm(inputs, rate) for inputs in INPUTS for rate in RATES]
    return [*sparse, *map(prosparse.long_control, prosparse.RATES)]


def arm(inputs: float, rate: float) -> Job:
    """Return one training; the neurons have their zeros by a shift from the start."""
    return Job(
        f"stage2-{inputs:g}-{rate:g}",
        start="bundled",
        sparsify=STAGE2 | {"sparsity": NEURONS},
        finetune=by_muon(EPOCH, rate, penalty=held(NEURONS), input_penalty=held(inputs)),
        keep=inputs == INPUTS[0],
    )


def is_part(name: str) -> bool:
    """Return whether a job's result belongs to the report."""
    return name.startswith(("stage2-", "prosparse-long-control-"))


def control(done: Done) -> Seeds:
    """Return the dense control's test loss, at its best rate."""
    rates = prosparse.RATES
    rate = best_rate(lambda rate, _: prosparse.long_control(rate), rates, done)
    return nats([done[prosparse.long_control(rate).name]])


def points(done: Done) -> list[dict[str, Any]]:
    """Return each target's result at its better rate."""
    return [done[arm(i, best_rate(lambda rate, _, i=i: arm(i, rate), RATES, done)).name] for i in INPUTS]


def ratio(found: dict[str, Any], what: str) -> float:
    """Return how many times fewer multiply-accumulates a token takes than in the dense model."""
    dense, sparse = found["final"]["macs_paper"][what]
    return dense / sparse


def tables(done: Done) -> str:
    """Return the table of the document."""
    base = control(done)
    rows = [["dense control", "", "", "", "", "1", "1", base.text(), perplexity(base), ""]]
    for found in points(done):
        loss = nats([found])
        shares = [share([found], name) for name in ("q", "gate", "neuron")]
        ratios = [f"{ratio(found, what):.2f}" for what in ("blocks", "with_head")]
        own = [f"{found['finetune']['learning_rate']:g}", *shares, *ratios]
        rows.append(["stage 2", *own, loss.text(), perplexity(loss), loss.against(base)])
    columns = ["", "learning rate", "zeros at q k v", "gate up", "neuron", "blocks, fewer macs", "with head"]
    return table([*columns, "test loss, nats", "perplexity", "against control"], rows)


def draw(done: Done, file: Path) -> None:
    """Draw what is paid for how many fewer multiply-accumulates."""
    base = control(done).mean
    with figure(file, 1) as plot:
        for (what, label), ink in zip(
            (("blocks", "blocks alone"), ("with_head", "with the head")), INKS[1:], strict=False
        ):
            ratios = [ratio(found, what) for found in points(done)]
            costs = [100 * (math.exp(found["final"]["nats"] - base) - 1) for found in points(done)]
            plot.plot(ratios, costs, marker="o", color=ink, label=label)
        plot.set(
            xlabel="macs_paper of a token, times fewer than dense",
            ylabel="% more perplexity than the control",
            ylim=(0, None),
        )
        plot.legend(fontsize=8)
