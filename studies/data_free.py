"""Data-free relufication: text that the dense model writes, against real text."""

from functools import partial

from studies.job import Job
from studies.plans import EPOCH, STAGE1, Done, settings, tuned

RATES = (6e-4, 1.2e-3, 2.4e-3)
ARMS = [(text, loss) for text in ("real", "self") for loss in ("ce", "kl")]


def plan(done: Done) -> list[Job]:
    """Return each text with each loss. One job writes the text; the others wait for it."""
    writer = arm("self", "kl", RATES[1], 0)
    arms = [a for a in ARMS if a[0] == "real" or writer.name in done]
    jobs = [job for text, loss in arms for job in tuned(partial(arm, text, loss), RATES, 1, done)]
    return [writer, *(job for job in jobs if job.name != writer.name)]


def arm(text: str, loss: str, rate: float, seed: int) -> Job:
    """Return one relufication, by cross-entropy or by distillation from the dense model."""
    return Job(
        f"data-free-{text}-{loss}-{rate:g}-{seed}",
        start="bundled",
        teacher="bundled",
        sparsify=STAGE1,
        finetune=settings(EPOCH // 4, rate, seed, distill=1.0 if loss == "kl" else 0.0),
        text=text,
    )
