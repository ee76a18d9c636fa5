"""What stage 2 saves: zeros at the inputs and at the neurons, in multiply-accumulates of the paper."""

from functools import partial

from studies import recovery
from studies.job import Job
from studies.plans import SHORT, STAGE2, Done, best_rate, progressive, settings

TARGETS = ((0.9, 0.55), (0.9, 0.6), (0.9, 0.65))
"""Shares of zeros wanted at the neurons and at the inputs of q k v, gate and up."""


def plan(done: Done) -> list[Job]:
    """Return stage 2 with penalties at the neurons and at the inputs, at stage 2's tuned rate."""
    grid = [recovery.arm("stage2", rate, 0) for rate in recovery.RATES]
    if not all(job.name in done for job in grid):
        return []
    rate = best_rate(partial(recovery.arm, "stage2"), recovery.RATES, done)
    return [arm(neurons, inputs, rate) for neurons, inputs in TARGETS]


def arm(neurons: float, inputs: float, rate: float) -> Job:
    """Return one training."""
    penalties = {"penalty": progressive(neurons), "input_penalty": progressive(inputs)}
    return Job(
        f"stage2-{neurons:g}-{inputs:g}",
        start="bundled",
        sparsify=STAGE2,
        finetune=settings(SHORT, rate, **penalties),
        after=[{"method": "fatrelu", "threshold": 0.01}],
        keep=True,
    )
