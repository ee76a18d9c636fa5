"""What the plans of the studies share: batches, tuned arms, the methods as data."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from studies.job import Job

Done = Mapping[str, dict[str, Any]]

EPOCH = 1275
"""Steps of BATCH windows that see the training text once: 20.8 M tokens."""
SHORT = 512
"""Steps of a relufication: 8.4 M tokens."""
BATCH = 64
STEPS = {"batch_size": BATCH, "window": 256, "log_steps": 25}

STAGE1 = {"method": "relufication", "stage": 1}
STAGE2 = {"method": "relufication", "stage": 2}
HELU = {"method": "relufication", "stage": 1, "activation": "helu"}


def shifted(sparsity: float, **changes: Any) -> dict[str, Any]:
    """Return stage 1 with the shift that gives a share of zeros before any training."""
    return STAGE1 | {"sparsity": sparsity} | changes


def settings(steps: int, rate: float, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Return a fine-tune by AdamW as data; a twentieth of it is warm-up."""
    own = {"steps": steps, "warmup_steps": steps // 20, "learning_rate": rate, "seed": seed}
    return STEPS | own | changes


def by_muon(steps: int, rate: float, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Return a fine-tune by Muon, which ends lower than AdamW at each one's best rate, dense and sparse."""
    return settings(steps, rate, seed, optimizer="muon", **changes)


def tuned(arm: Callable[[float, int], Job], rates: Sequence[float], seeds: int, done: Done) -> list[Job]:
    """Return an arm's jobs: each learning rate, then more seeds at the one best on validation text."""
    grid = [arm(rate, 0) for rate in rates]
    if not are_done(grid, done):
        return grid
    rate = best_rate(arm, rates, done)
    return grid + [arm(rate, seed) for seed in range(1, seeds)]


def are_done(jobs: Sequence[Job], done: Done) -> bool:
    """Return whether there are results of all these jobs."""
    return all(job.name in done for job in jobs)


def best_rate(arm: Callable[[float, int], Job], rates: Sequence[float], done: Done) -> float:
    """Return the learning rate that is best on validation text. Every one must have been tried."""
    return min(rates, key=lambda rate: valid_loss(done[arm(rate, 0).name]))


def valid_loss(result: dict[str, Any]) -> float:
    """Return the loss on the validation text; a run that diverged lost."""
    found = result["final"]["valid"]
    return found if found == found else float("inf")


def best_seeds(
    arm: Callable[[float, int], Job], rates: Sequence[float], seeds: int, done: Done
) -> list[dict[str, Any]]:
    """Return the results at the best learning rate, one for each seed that is done."""
    rate = best_rate(arm, rates, done)
    names = [arm(rate, seed).name for seed in range(seeds)]
    return [done[name] for name in names if name in done]


def progressive(target: float) -> dict[str, Any]:
    """Return ProSparse's penalty, steered to a share of zeros; the last fifth of the run holds it."""
    return {"strength": [0.0, 0.25, 0.5, 1.0, 1.0], "until": [0.05, 0.25, 0.5, 0.8, 1.0], "target": target}


def held(target: float) -> dict[str, Any]:
    """Return a penalty that is there after a tenth of the run, and holds the share of zeros from then on."""
    return {"strength": [0.0, 1.0, 1.0], "until": [0.02, 0.1, 1.0], "target": target}
