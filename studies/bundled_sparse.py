"""The sparse model that relufy ships, made of the bundled dense one, and its control."""

from typing import Any

from studies.bundled import SPARSE_EPOCHS, SPARSE_RATE, STEPS, TARGET, WINDOW
from studies.job import Job
from studies.plans import Done, by_muon, held, shifted


def plan(done: Done) -> list[Job]:
    """Return the sparse model's training, and the dense model trained as long."""
    penalty = {"penalty": held(TARGET)}
    return [_job("sparse", shifted(TARGET), penalty), _job("control", {}, {})]


def _job(name: str, sparsify: dict[str, Any], changes: dict[str, Any]) -> Job:
    own = {"window": WINDOW, "schedule": "wsd"}
    return Job(
        f"bundled-{name}",
        start="bundled",
        sparsify=sparsify,
        finetune=by_muon(SPARSE_EPOCHS * STEPS, SPARSE_RATE, **own, **changes),
        cett=name == "sparse",
        keep=True,
    )
