"""Activations from scratch: the same model and tokens, another activation; and ReLU with a penalty."""

from functools import partial
from pathlib import Path
from typing import Any

from studies.job import Job
from studies.plans import EPOCH, Done, best_seeds, settings, tuned
from studies.summary import Seeds, percent, table

RATES = (2e-3, 5e-3)
SEEDS = 3
ACTIVATIONS = ("silu", "gelu", "beta-silu:8", "relu", "relu2")
NAMES = {"silu": "SiLU", "gelu": "GELU", "beta-silu:8": "x sigmoid(8x)", "relu": "ReLU", "relu2": "ReLU²"}
PENALISED = {"ReLU, penalty to 90 %": "0.9", "ReLU, penalty to 95 %": "0.95"}
INKS = ("#7a7a7a", "#b8860b", "#8e44ad", "#1f77b4", "#2a9d5c", "#d1495b", "#8b1e3f")


def plan(done: Done) -> list[Job]:
    """Return each activation with its learning rate tuned."""
    return [job for name in ACTIVATIONS for job in tuned(partial(arm, name), RATES, SEEDS, done)]


def arm(activation: str, rate: float, seed: int) -> Job:
    """Return one training from scratch."""
    return Job(
        f"activations-{activation.replace(':', '-')}-{rate:g}-{seed}",
        activation=activation,
        finetune=settings(EPOCH // 2, rate, seed),
        cett=True,
    )


def is_part(name: str) -> bool:
    """Return whether a job's result belongs to the report (with the penalised ones of prosparse.py)."""
    return name.startswith(("activations-", "prosparse-scratch-"))


def arms(done: Done) -> dict[str, list[dict[str, Any]]]:
    """Return the results of each row of the table, one for each seed."""
    rows = {NAMES[a]: best_seeds(partial(arm, a), RATES, SEEDS, done) for a in ACTIVATIONS}
    for title, target in PENALISED.items():
        rows[title] = [done[f"prosparse-scratch-{target}-{seed}"] for seed in range(SEEDS)]
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
    return table([*columns, "left out at CETT 0.2"], rows)


def draw(done: Done, file: Path) -> None:
    """Draw the validation loss over tokens, and what is zero or could be left out."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    from relufy.plot_style import plot_style

    with pyplot.rc_context(plot_style("#222222")):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.5, 4), width_ratios=(1, 1))
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
        left.grid(axis="y")
        left.legend(fontsize=8)
        right.set(xlabel="% of neurons: zero (bar), left out at CETT 0.2 (mark)", xlim=(0, 100))
        right.invert_yaxis()
        figure.tight_layout()
        figure.savefig(file, dpi=140)
        pyplot.close(figure)
