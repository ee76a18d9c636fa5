"""The relufied model that docs/decoding.md is measured on: 91 M parameters, too large for most caches."""

from typing import Any

from studies.job import Job
from studies.plans import EPOCH, Done, by_muon, held, shifted

SHAPE = "125m"
"""With the novels' vocabulary of 4,096 pieces it has 91 M parameters."""
BATCH = 128
DENSE_EPOCHS = 3
DENSE_RATE = 3e-3
RATES = (5e-4, 1e-3, 2e-3)
TARGET = 0.9


def plan(done: Done) -> list[Job]:
    """Return the dense training; the sparse model that starts from it, and its control."""
    return [
        _job("dense", DENSE_EPOCHS, DENSE_RATE, shape=SHAPE, schedule="wsd"),
        _job("control", 1, RATES[1], start="job:decoding-dense"),
        *(
            _job(f"sparse-{rate:g}", 1, rate, start="job:decoding-dense", penalty=held(TARGET))
            for rate in RATES
        ),
    ]


def _job(name: str, epochs: int, rate: float, shape: str = "", start: str = "new", **changes: Any) -> Job:
    return Job(
        f"decoding-{name}",
        start=start,
        shape=shape,
        sparsify=shifted(TARGET) if "penalty" in changes else {},
        finetune=by_muon(epochs * EPOCH // 2, rate, batch_size=BATCH, precision="bf16", **changes),
        keep=name != "control",
    )
