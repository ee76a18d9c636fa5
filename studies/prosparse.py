"""The frontier of ProSparse: perplexity against neuron sparsity, relufied and from scratch."""

from functools import partial

from studies import activations, recovery
from studies.job import Job
from studies.plans import EPOCH, HELU, SHORT, STAGE1, Done, best_rate, progressive, settings

TARGETS = (0.8, 0.85, 0.9, 0.95)
SEEDS = {0.8: 3, 0.9: 3}
SCRATCH_TARGETS = (0.9, 0.95)
FATRELU = [{"method": "fatrelu", "threshold": 0.01}]


def plan(done: Done) -> list[Job]:
    """Return progressive penalties at tuned rates, fixed ones as strong as these ended, and variants."""
    return _relufied(done) + _scratch(done)


def _relufied(done: Done) -> list[Job]:
    grid = [recovery.arm("stage1", rate, 0) for rate in recovery.RATES]
    if not all(job.name in done for job in grid):
        return []
    rate = best_rate(partial(recovery.arm, "stage1"), recovery.RATES, done)
    jobs = [relufied(t, rate, seed) for t in TARGETS for seed in range(SEEDS.get(t, 1))]
    jobs += [variant(name, 0.9, rate) for name in ("helu", "distilled", "faster")]
    for target in TARGETS:
        base = relufied(target, rate, 0).name
        if base in done:
            jobs.append(fixed(target, done[base]["curve"][-1]["penalty_strength"], rate))
    return jobs


def relufied(target: float, rate: float, seed: int) -> Job:
    """Return a relufied model trained towards a share of zeros."""
    return Job(
        f"prosparse-{target:g}-{seed}",
        start="bundled",
        sparsify=STAGE1,
        finetune=settings(SHORT, rate, seed, penalty=progressive(target)),
        after=FATRELU,
    )


def variant(name: str, target: float, rate: float) -> Job:
    """Return the same with one thing changed."""
    changes = {"distill": 0.5} if name == "distilled" else {}
    return Job(
        f"prosparse-{target:g}-{name}",
        start="bundled",
        teacher="bundled" if name == "distilled" else "",
        sparsify=HELU if name == "helu" else STAGE1,
        finetune=settings(
            SHORT, rate * (2 if name == "faster" else 1), penalty=progressive(target), **changes
        ),
        after=FATRELU if name != "helu" else [],
    )


def fixed(target: float, strength: float, rate: float) -> Job:
    """Return a training with one strength throughout, that with which the progressive one ended."""
    penalty = {"strength": [strength], "until": [1.0]}
    return Job(
        f"prosparse-fixed-{target:g}",
        start="bundled",
        sparsify=STAGE1,
        finetune=settings(SHORT, rate, penalty=penalty),
        after=FATRELU,
    )


def _scratch(done: Done) -> list[Job]:
    arm = partial(activations.arm, "relu")
    if not all(arm(rate, 0).name in done for rate in activations.RATES):
        return []
    rate = best_rate(arm, activations.RATES, done)
    return [scratch(target, rate, seed) for target in SCRATCH_TARGETS for seed in range(3)]


def scratch(target: float, rate: float, seed: int) -> Job:
    """Return a ReLU model trained from scratch towards a share of zeros."""
    return Job(
        f"prosparse-scratch-{target:g}-{seed}",
        activation="relu",
        finetune=settings(EPOCH // 2, rate, seed, penalty=progressive(target)),
        after=FATRELU,
    )
