"""The dense model that relufy ships, from scratch."""

from studies.job import Job
from studies.plans import EPOCH, Done, by_muon

WINDOW = 512
STEPS = EPOCH // 2
"""Of BATCH windows of WINDOW tokens that see the training text once."""
DENSE_RATES = (6e-3, 1.2e-2)
DENSE_EPOCHS = 4
SPARSE_RATE = 5e-3
SPARSE_EPOCHS = 2
TARGET = 0.9


def plan(done: Done) -> list[Job]:
    """Return the dense trainings; the sparse model starts from the better one (bundled_sparse.py)."""
    return [dense(rate) for rate in DENSE_RATES]


def dense(rate: float) -> Job:
    """Return a training from scratch; the better one on validation text was taken."""
    changes = {"window": WINDOW, "schedule": "wsd", "log_steps": 100}
    return Job(f"bundled-dense-{rate:g}", finetune=by_muon(DENSE_EPOCHS * STEPS, rate, **changes), keep=True)
