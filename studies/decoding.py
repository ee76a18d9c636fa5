"""The relufied model that docs/decoding.md is measured on: 91 M parameters, too large for most caches."""

from pathlib import Path
from typing import Any

from studies.figure import INKS, figure
from studies.job import Job
from studies.plans import EPOCH, Done, by_muon, held, shifted
from studies.summary import compared

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


def is_part(name: str) -> bool:
    """Return whether a job's result belongs to the report."""
    return name.startswith("decoding-")


NAMES = {"decoding-dense": "SiLU, from scratch", "decoding-control": "SiLU, trained on"} | {
    f"decoding-sparse-{rate:g}": "shift to 90 %, held" for rate in RATES
}


def tables(done: Done) -> str:
    """Return the table of the document."""
    return compared([(label, done[name]) for name, label in NAMES.items()])


def draw(done: Done, file: Path) -> None:
    """Draw the validation loss of the models made from the dense one, and their zeros by layer."""
    with figure(file) as (left, right):
        for name, ink in zip(list(NAMES)[1:], INKS, strict=False):
            result = done[name]
            label = f"{NAMES[name]}, {result['finetune']['learning_rate']:g}"
            left.plot(
                *zip(*((t / 1e6, loss) for t, loss in result["checks"]), strict=True), color=ink, label=label
            )
            if "sparse" in name:
                zeros = result["final"]["sparsity_neuron_by_layer"]
                right.plot([100 * layer for layer in zeros], "o-", color=ink, label=label)
        before = done["decoding-dense"]["checks"][-1][1]
        left.axhline(before, color="#999999", linewidth=0.8, label="SiLU, from scratch")
        left.set(xlabel="million tokens", ylabel="validation loss, nats per token")
        left.legend(fontsize=8)
        right.set(xlabel="layer", ylabel="% of neurons that are zero")
