"""The frontier of ProSparse: perplexity against neuron sparsity, by each way to get there."""

import math
from functools import partial
from pathlib import Path
from typing import Any

from studies import recovery
from studies.figure import INKS, figure
from studies.job import Job
from studies.plans import (
    EPOCH,
    SHORT,
    STAGE1,
    Done,
    are_done,
    best_rate,
    by_muon,
    held,
    progressive,
    shifted,
    tuned,
)
from studies.summary import Seeds, nats, perplexity, share, table

RATES = recovery.RATES
TUNED_AT = 0.9
"""The target at which a way's learning rate is tuned."""
TARGETS = (0.8, 0.85, 0.9, 0.95)
SEEDS = {0.8: 3, 0.9: 3}
LONG_TARGETS = (0.8, 0.9, 0.95)
FATRELU = [{"method": "fatrelu", "threshold": 0.01}]
VARIANTS: dict[str, dict[str, Any]] = {
    "distilled": {"distill": 0.5},
    "helu": {"activation": "helu"},
    "per-layer": {"per_layer": True},
}


def plan(done: Done) -> list[Job]:
    """Return each way with its rate tuned, at all targets; variants; and longer runs with a control."""
    jobs = []
    for way in ("shifted", "progressive"):
        jobs += tuned(partial(arm, way, TUNED_AT), RATES, SEEDS[TUNED_AT], done)
    for way, tuned_as in (
        ("shifted", "shifted"),
        ("progressive", "progressive"),
        ("held", "shifted"),
        ("fixed", "progressive"),
    ):
        if not are_done([arm(tuned_as, TUNED_AT, rate, 0) for rate in RATES], done):
            continue
        rate = best_rate(partial(arm, tuned_as, TUNED_AT), RATES, done)
        jobs += _fixed(rate, done) if way == "fixed" else _targets(way, rate)
        if way == "shifted":
            jobs += [variant(name, rate) for name in VARIANTS]
            jobs += [long(target, rate) for target in LONG_TARGETS]
    return list({job.name: job for job in [*jobs, *map(long_control, RATES)]}.values())


def _targets(way: str, rate: float) -> list[Job]:
    seeds = SEEDS if way != "held" else {}
    return [arm(way, t, rate, seed) for t in TARGETS for seed in range(seeds.get(t, 1))]


def _fixed(rate: float, done: Done) -> list[Job]:
    bases = {target: arm("progressive", target, rate, 0).name for target in TARGETS}
    return [
        fixed(target, done[name]["curve"][-1]["penalty_strength"], rate)
        for target, name in bases.items()
        if name in done
    ]


def arm(way: str, target: float, rate: float, seed: int) -> Job:
    """Return one training towards a share of zeros.

    "progressive" is ProSparse's, from a plain ReLU; "held" is there early and stays; "shifted" has the zeros
    from the start, by a shift, and the penalty holds them.
    """
    penalty = progressive(target) if way == "progressive" else held(target)
    return Job(
        f"prosparse-{way}-{target:g}-{rate:g}-{seed}",
        start="bundled",
        sparsify=shifted(target) if way == "shifted" else STAGE1,
        finetune=by_muon(SHORT, rate, seed, penalty=penalty),
        after=FATRELU if way == "progressive" else [],
    )


def variant(name: str, rate: float) -> Job:
    """Return the shifted way to TUNED_AT with one thing changed."""
    changes = VARIANTS[name]
    is_loss = name == "distilled"
    return Job(
        f"prosparse-shifted-{TUNED_AT:g}-{name}",
        start="bundled",
        teacher="bundled" if is_loss else "",
        sparsify=shifted(TUNED_AT, **({} if is_loss else changes)),
        finetune=by_muon(SHORT, rate, penalty=held(TUNED_AT), **(changes if is_loss else {})),
    )


def fixed(target: float, strength: float, rate: float) -> Job:
    """Return a training with one strength throughout, that with which the progressive one ended."""
    penalty = {"strength": [strength], "until": [1.0]}
    return Job(
        f"prosparse-fixed-{target:g}",
        start="bundled",
        sparsify=STAGE1,
        finetune=by_muon(SHORT, rate, penalty=penalty),
    )


def long(target: float, rate: float) -> Job:
    """Return the shifted way over the whole text."""
    return Job(
        f"prosparse-long-{target:g}",
        start="bundled",
        sparsify=shifted(target),
        finetune=by_muon(EPOCH, rate, penalty=held(target)),
    )


def long_control(rate: float) -> Job:
    """Return the dense model trained on the whole text."""
    return Job(f"prosparse-long-control-{rate:g}", start="bundled", finetune=by_muon(EPOCH, rate))


def is_part(name: str) -> bool:
    """Return whether a job's result belongs to the report (with recovery's control and stage 1)."""
    return name.startswith(("prosparse-", "recovery-control-", "recovery-stage1-"))


NAMES = {
    "shifted": "shift, then held",
    "held": "plain ReLU, held early",
    "progressive": "progressive (ProSparse)",
    "fixed": "fixed strength",
    "fatrelu": "stage 1, FATReLU, untrained",
    "long": "shift, then held, 20.8 M tokens",
}


def frontier(done: Done) -> dict[str, list[list[dict[str, Any]]]]:
    """Return the points of each way: the results of a target, one for each seed."""
    rates = {way: best_rate(partial(arm, way, TUNED_AT), RATES, done) for way in ("shifted", "progressive")}
    rates["held"] = rates["shifted"]
    points = {
        way: [
            [done[name] for seed in range(SEEDS[TUNED_AT]) if (name := arm(way, t, rate, seed).name) in done]
            for t in TARGETS
        ]
        for way, rate in rates.items()
    }
    points["fixed"] = [[done[fixed(target, 0.0, 1.0).name]] for target in TARGETS]
    stage1 = recovery.seeds_of("stage1", done)
    points["fatrelu"] = [stage1, *([{"final": r["after"][i]} for r in stage1] for i in range(2))]
    points["long"] = [[done[long(target, 1.0).name]] for target in LONG_TARGETS]
    return points


def controls(done: Done) -> tuple[Seeds, Seeds]:
    """Return the dense control's test loss after SHORT steps and after a whole epoch, at its best rate."""
    rate = best_rate(lambda rate, _: long_control(rate), RATES, done)
    return nats(recovery.seeds_of("control", done)), nats([done[long_control(rate).name]])


def tables(done: Done) -> str:
    """Return the points of the frontier, and the variants of one of them."""
    control, long_run = controls(done)
    rows = [
        [
            NAMES[way],
            share(results, "neuron"),
            share(results, "dead", 2),
            share(results, "union_density"),
            nats(results).text(),
            perplexity(nats(results)),
            nats(results).against(long_run if way == "long" else control),
        ]
        for way, points in frontier(done).items()
        for results in points
    ]
    rows.insert(0, ["dense control, 8.4 M tokens", "", "", "", control.text(), perplexity(control), ""])
    rows.append(["dense control, 20.8 M tokens", "", "", "", long_run.text(), perplexity(long_run), ""])
    columns = ["way", "zeros", "dead", "used in 8 tokens", "test loss, nats", "perplexity", "against control"]
    variants = [
        [name, share([found], "neuron"), nats([found]).text(), nats([found]).against(control)]
        for name in VARIANTS
        if (found := done.get(variant(name, 1.0).name))
    ]
    return (
        table(columns, rows)
        + "\n"
        + table(["shift to 90 %, held, with", "zeros", "test loss", "against control"], variants)
    )


def draw(done: Done, file: Path) -> None:
    """Draw perplexity against sparsity, all ways; and the best ones near the control."""
    control, long_run = controls(done)
    with figure(file) as axes:
        for plot, limit in zip(axes, (40, 10), strict=True):
            for (way, points), ink in zip(frontier(done).items(), INKS, strict=False):
                base = long_run if way == "long" else control
                zeros = [100 * Seeds.of([r["final"]["sparsity"]["neuron"] for r in rs]).mean for rs in points]
                costs = [100 * (math.exp(nats(results).mean - base.mean) - 1) for results in points]
                style = "--" if way in ("fatrelu", "long") else "-"
                plot.plot(zeros, costs, style, color=ink, marker="o", markersize=4, label=NAMES[way])
            plot.axhline(0, color="#999999", linewidth=0.8)
            plot.set(xlabel="% of neurons that are zero", ylim=(-1, limit), xlim=(64, 97))
        axes[0].set(ylabel="% more perplexity than the control\nat equal tokens")
        axes[0].legend(fontsize=8)
