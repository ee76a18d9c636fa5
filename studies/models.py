"""Longer trainings: a larger model from scratch, relufied afterwards; the sparse model that relufy ships."""

from typing import Any

from studies.job import Job
from studies.plans import EPOCH, STAGE1, STAGE2, Done, progressive, settings

RATE = 4e-3
"""Of Muon: the best of 1e-3, 2e-3 and 4e-3 in trials of a quarter of an epoch."""
LARGE_RATE = 1e-3
LARGE_STEPS = 3 * EPOCH // 4
SHIPPED_EPOCHS = 2
LARGE_ARMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "control": ({}, {}),
    "stage1": (STAGE1, {}),
    "stage2": (STAGE2, {}),
    "prosparse": (STAGE1, {"penalty": progressive(0.9)}),
}


def plan(done: Done) -> list[Job]:
    """Return the trainings; the larger model is relufied once it is there."""
    scratch = [_large("silu", {}), _large("relu", {}), _large("relu", {"penalty": progressive(0.9)})]
    return [*scratch, *map(_shipped, ("prosparse", "control")), *map(_relufied, LARGE_ARMS)]


def _large(activation: str, changes: dict[str, Any]) -> Job:
    name = "prosparse" if changes else activation
    return Job(
        f"30m-{name}",
        shape="30m",
        activation=activation,
        finetune=settings(LARGE_STEPS, RATE, optimizer="muon", schedule="wsd", decay=0.5, **changes),
        checks=16,
        cett=True,
        keep=name == "silu",
    )


def _relufied(name: str) -> Job:
    sparsify, changes = LARGE_ARMS[name]
    return Job(
        f"30m-silu-{name}",
        start="job:30m-silu",
        sparsify=sparsify,
        finetune=settings(EPOCH // 4, LARGE_RATE, **changes),
        preactivations=name == "stage1",
    )


def _shipped(name: str) -> Job:
    sparsify, changes = LARGE_ARMS[name]
    return Job(
        f"shipped-{name}",
        start="bundled",
        sparsify=sparsify,
        finetune=settings(
            SHIPPED_EPOCHS * EPOCH, 2e-3, optimizer="muon", schedule="wsd", decay=0.5, **changes
        ),
        checks=16,
        after=[{"method": "fatrelu", "threshold": 0.01}] if sparsify else [],
        cett=True,
        keep=True,
    )
