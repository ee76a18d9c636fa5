"""Recovery: how relufied models come back with training, against the dense model trained as long."""

from functools import partial

from studies.job import Job
from studies.plans import HELU, SHIFTED, SHORT, STAGE1, STAGE2, Done, settings, tuned

RATES = (6e-4, 1.2e-3, 2.4e-3)
SEEDS = 3
ARMS = {"control": {}, "stage1": STAGE1, "stage2": STAGE2, "shifted": SHIFTED, "helu": HELU}


def plan(done: Done) -> list[Job]:
    """Return every arm with its learning rate tuned."""
    return [job for name in ARMS for job in tuned(partial(arm, name), RATES, SEEDS, done)]


def arm(name: str, rate: float, seed: int) -> Job:
    """Return one training of an arm."""
    return Job(
        f"recovery-{name}-{rate:g}-{seed}",
        start="bundled",
        sparsify=ARMS[name],
        finetune=settings(SHORT, rate, seed),
        after=[{"method": "fatrelu", "sparsity": share} for share in (0.8, 0.9)] if name == "stage1" else [],
        checks=12,
        preactivations=name == "stage1" and seed == 0,
    )
