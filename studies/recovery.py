"""Recovery: how relufied models come back with training, against the dense model trained as long."""

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from studies.figure import INKS, figure
from studies.job import Job
from studies.plans import HELU, SHORT, STAGE1, STAGE2, Done, best_seeds, by_muon, shifted, tuned
from studies.summary import GRID, mean, nats, percent, perplexity, share, table

RATES = (2.5e-3, 5e-3, 1e-2)
SEEDS = 3
ARMS: dict[str, dict[str, Any]] = {
    "control": {},
    "stage1": STAGE1,
    "stage2": STAGE2,
    "shifted": shifted(0.9),
    "helu": HELU,
}


def plan(done: Done) -> list[Job]:
    """Return every arm with its learning rate tuned."""
    return [job for name in ARMS for job in tuned(partial(arm, name), RATES, SEEDS, done)]


def arm(name: str, rate: float, seed: int) -> Job:
    """Return one training of an arm."""
    return Job(
        f"recovery-{name}-{rate:g}-{seed}",
        start="bundled",
        sparsify=ARMS[name],
        finetune=by_muon(SHORT, rate, seed),
        after=[{"method": "fatrelu", "sparsity": share} for share in (0.8, 0.9)] if name == "stage1" else [],
        checks=12,
        preactivations=name in ("stage1", "shifted") and seed == 0,
    )


def is_part(name: str) -> bool:
    """Return whether a job's result belongs to the report."""
    return name.startswith("recovery-")


NAMES = {
    "control": "dense control",
    "stage1": "stage 1",
    "helu": "HeLU",
    "shifted": "shifted to 90 %",
    "stage2": "stage 2",
}


def seeds_of(name: str, done: Done) -> list[dict[str, Any]]:
    """Return an arm's results at its best rate, one for each seed."""
    return best_seeds(partial(arm, name), RATES, SEEDS, done)


def tables(done: Done) -> str:
    """Return the table of the arms, and that of FATReLU after stage 1."""
    found = {name: seeds_of(name, done) for name in NAMES}
    control = nats(found["control"])
    rows = [
        [
            NAMES[name],
            f"{results[0]['finetune']['learning_rate']:g}",
            nats(results).text(),
            perplexity(nats(results)),
            "" if name == "control" else nats(results).against(control),
            f"{results[0]['before']['nats']:.3f}",
            _zeros(results, "before"),
            _zeros(results, "final"),
            share(results, "dead", 2),
        ]
        for name, results in found.items()
    ]
    columns = ["arm", "learning rate", "test loss, nats", "perplexity", "against the control"]
    first = table([*columns, "loss before training", "zeros before", "zeros after", "dead"], rows)
    return first + "\n" + _inputs(found["stage2"]) + "\n" + _fatrelu(found["stage1"], control)


def _zeros(results: list[dict[str, Any]], when: str) -> str:
    zeros = mean([result[when]["sparsity"]["neuron"] for result in results])
    return percent(zeros) if zeros else ""


def _inputs(results: list[dict[str, Any]]) -> str:
    sites = ("q", "gate", "neuron")
    rows = [
        [when, *(percent(mean([result[key]["sparsity"][site] for result in results])) for site in sites)]
        for when, key in (("before", "before"), ("after", "final"))
    ]
    return table(["stage 2, zeros at", "q k v", "gate up", "neuron"], rows)


def _fatrelu(results: list[dict[str, Any]], control: Any) -> str:
    rows = []
    for index in range(2):
        found = [{"final": result["after"][index]} for result in results]
        rows.append([share(found, "neuron"), nats(found).text(), nats(found).against(control)])
    return table(["stage 1, then FATReLU untrained: zeros", "test loss", "against the control"], rows)


def draw(done: Done, file: Path) -> None:
    """Draw the losses over tokens, and the pre-activations before and after."""
    found = {name: seeds_of(name, done) for name in NAMES}
    with figure(file) as (losses, histogram):
        for (name, results), ink in zip(found.items(), INKS, strict=False):
            checks = [result["checks"] for result in results]
            curve = [mean([point[1] for point in points]) for points in zip(*checks, strict=True)]
            losses.plot([point[0] / 1e6 for point in checks[0]], curve, color=ink, label=NAMES[name])
        losses.set(
            xlabel="million tokens",
            ylabel="validation loss, nats per token",
            ylim=(None, 4.0),
        )
        losses.legend(fontsize=8)
        width, middles = GRID[1] - GRID[0], [value + 0.125 for value in GRID[:-1]]
        for name, when, label, ink in (
            ("stage1", "before", "before training", INKS[0]),
            ("stage1", "after", "after stage 1", INKS[1]),
            ("shifted", "after", "after the shifted one", INKS[3]),
        ):
            shares = found[name][0]["preactivations"][when]
            heights = [(b - a) / width for a, b in pairwise(shares)]
            histogram.plot(middles, heights, color=ink, label=label, drawstyle="steps-mid")
        histogram.axvline(0, color="#999999", linewidth=0.8)
        histogram.set(
            xlabel="pre-activation (the gate's output)", ylabel="density, mean over layers", xlim=(-6, 4)
        )
        histogram.legend(fontsize=8)
