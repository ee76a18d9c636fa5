"""Activations from scratch: the same model and tokens, another activation; and ReLU with a penalty."""

from pathlib import Path
from typing import Any

from studies.figure import INKS, figure
from studies.job import Job
from studies.plans import EPOCH, Done, progressive, settings
from studies.summary import Seeds, percent, table

RATES = (7e-4, 1.4e-3, 2e-3, 2.8e-3, 5e-3)
RATE = 2e-3
"""What the table is of: at 2.8e-3 one of three seeds or so breaks away, SiLU's and ReLU's among them."""
SEEDED = (2e-3, 2.8e-3)
"""Rates that more than one seed is tried at."""
SEEDS = 3
ACTIVATIONS = ("silu", "gelu", "beta-silu:8", "relu", "relu2")
NAMES = {"silu": "SiLU", "gelu": "GELU", "beta-silu:8": "x sigmoid(8x)", "relu": "ReLU", "relu2": "ReLU²"}
PENALISED = {"ReLU, penalty to 90 %": 0.9, "ReLU, penalty to 95 %": 0.95}


def plan(done: Done) -> list[Job]:
    """Return each activation at each rate, with more seeds at SEEDED, and ReLU with penalties."""
    jobs = [arm(name, rate, 0) for name in ACTIVATIONS for rate in RATES]
    jobs += [arm(name, rate, seed) for name in ACTIVATIONS for rate in SEEDED for seed in range(1, SEEDS)]
    return jobs + [penalised(t, RATE, seed) for t in PENALISED.values() for seed in range(SEEDS)]


def arm(activation: str, rate: float, seed: int) -> Job:
    """Return one training from scratch."""
    return Job(
        f"activations-{activation.replace(':', '-')}-{rate:g}-{seed}",
        activation=activation,
        finetune=settings(EPOCH // 2, rate, seed),
        cett=True,
    )


def penalised(target: float, rate: float, seed: int) -> Job:
    """Return ReLU from scratch with ProSparse's penalty, steered to a share of zeros."""
    return Job(
        f"activations-relu-{rate:g}-{seed}-to-{target:g}",
        activation="relu",
        finetune=settings(EPOCH // 2, rate, seed, penalty=progressive(target)),
    )


def is_part(name: str) -> bool:
    """Return whether a job's result belongs to the report."""
    return name.startswith("activations-")


def arms(done: Done) -> dict[str, list[dict[str, Any]]]:
    """Return the results of each row of the table, one for each seed."""
    rows = {NAMES[a]: [done[arm(a, RATE, seed).name] for seed in range(SEEDS)] for a in ACTIVATIONS}
    for title, target in PENALISED.items():
        rows[title] = [done[penalised(target, RATE, seed).name] for seed in range(SEEDS)]
    return rows


def tables(done: Done) -> str:
    """Return the table of the document."""
    rows = []
    silu = Seeds.of([found["final"]["nats"] for found in arms(done)["SiLU"]])
    for title, found in arms(done).items():
        finals = [result["final"] for result in found]
        nats = Seeds.of([final["nats"] for final in finals])
        zeros = Seeds.of([final["sparsity"]["neuron"] for final in finals])
        cett = [final["cett"] for final in finals if final["cett"] is not None]
        dead = [final["dead"] for final in finals if final["dead"] is not None]
        union = [final["union_density"] for final in finals if final["union_density"] is not None]
        rows.append(
            [
                title,
                f"{found[0]['finetune']['learning_rate']:g}",
                nats.text(),
                f"{nats.mean - silu.mean:+.4f} ± {(nats.error**2 + silu.error**2) ** 0.5:.4f}",
                percent(zeros.mean),
                percent(Seeds.of(dead).mean, 2) if dead else "",
                percent(Seeds.of(union).mean) if union else "",
                percent(Seeds.of(cett).mean) if cett else "",
            ]
        )
    columns = [
        "activation",
        "learning rate",
        "test loss, nats",
        "against SiLU",
        "zeros",
        "dead",
        "used in 8 tokens",
    ]
    return table([*columns, "left out at CETT 0.2"], rows) + "\n" + _rates(done)


def _rates(done: Done) -> str:
    """Return the loss at each learning rate, seed 0, and the worst of the seeds where there are more."""
    rows = []
    for name in ACTIVATIONS:
        cells = []
        for rate in RATES:
            names = [arm(name, rate, seed).name for seed in range(SEEDS)]
            losses = [done[name]["final"]["nats"] for name in names if name in done]
            worst = f" (worst of {len(losses)} {max(losses):.3f})" if len(losses) > 1 else ""
            cells.append(f"{losses[0]:.3f}{worst}")
        rows.append([NAMES[name], *cells])
    return table(["test loss at learning rate", *(f"{rate:g}" for rate in RATES)], rows)


def draw(done: Done, file: Path) -> None:
    """Draw the validation loss over tokens, and what is zero or could be left out."""
    with figure(file) as (left, right):
        for (title, found), ink in zip(arms(done).items(), INKS, strict=True):
            checks = [result["checks"] for result in found]
            tokens = [point[0] / 1e6 for point in checks[0]]
            means = [sum(point[1] for point in points) / len(points) for points in zip(*checks, strict=True)]
            left.plot(tokens, means, color=ink, label=title, linewidth=1.4)
            finals = [result["final"] for result in found]
            zeros = Seeds.of([final["sparsity"]["neuron"] for final in finals]).mean
            right.barh(title, 100 * zeros, height=0.55, color=ink)
            cett = [final["cett"] for final in finals if final["cett"] is not None]
            if cett:
                right.plot([100 * Seeds.of(cett).mean], [title], "|", color="#222222", markersize=13)
        left.set(xlabel="million tokens", ylabel="validation loss, nats per token")
        left.legend(fontsize=8)
        right.set(xlabel="% of neurons: zero (bar), left out at CETT 0.2 (mark)", xlim=(0, 100))
        right.invert_yaxis()
