"""Data-free relufication: text that the dense model writes, against real text."""

from functools import partial
from pathlib import Path
from typing import Any

from studies.figure import INKS, figure
from studies.job import Job
from studies.plans import EPOCH, STAGE1, Done, by_muon, tuned, valid_loss
from studies.summary import mean, nats, perplexity, share, table

RATES = (2.5e-3, 5e-3, 1e-2)
SEEDS = 3
ARMS = [(text, loss) for text in ("real", "self") for loss in ("ce", "kl")]


def plan(done: Done) -> list[Job]:
    """Return each text with each loss, its learning rate tuned."""
    return [job for text, loss in ARMS for job in tuned(partial(arm, text, loss), RATES, SEEDS, done)]


def arm(text: str, loss: str, rate: float, seed: int) -> Job:
    """Return one relufication, by cross-entropy or by distillation from the dense model."""
    return Job(
        f"data-free-{text}-{loss}-{rate:g}-{seed}",
        start="bundled",
        teacher="bundled",
        sparsify=STAGE1,
        finetune=by_muon(EPOCH // 4, rate, seed, distill=1.0 if loss == "kl" else 0.0),
        text=text,
    )


def is_part(name: str) -> bool:
    """Return whether a job's result belongs to the report."""
    return name.startswith("data-free-")


TEXTS = {"real": "novels", "self": "its own"}
LOSSES = {"ce": "cross-entropy", "kl": "KL to the dense model"}


def arms(done: Done) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return each arm's results at the best of the rates that were tried, one for each seed."""
    found = {}
    for text, loss in ARMS:
        tried = [rate for rate in RATES if arm(text, loss, rate, 0).name in done]
        if tried:
            rate = min(tried, key=lambda r: valid_loss(done[arm(text, loss, r, 0).name]))
            names = [arm(text, loss, rate, seed).name for seed in range(SEEDS)]
            found[text, loss] = [done[name] for name in names if name in done]
    return found


def tables(done: Done) -> str:
    """Return the table of the document."""
    found = arms(done)
    rows = []
    for (text, loss), results in found.items():
        best = nats(results)
        losses = {rate: done.get(arm(text, loss, rate, 0).name) for rate in RATES}
        tried = ", ".join(f"{rate:g}: {r['final']['nats']:.4f}" for rate, r in losses.items() if r)
        against = "" if (text, loss) == ("real", "ce") else best.against(nats(found["real", "ce"]))
        seeds = str(len(results))
        own = [best.text(), perplexity(best), against, share(results, "neuron"), seeds, tried]
        rows.append([TEXTS[text], LOSSES[loss], *own])
    columns = ["text", "loss", "test loss, nats", "perplexity", "against novels, cross-entropy", "zeros"]
    return table([*columns, "seeds", "by learning rate, seed 0"], rows)


def draw(done: Done, file: Path) -> None:
    """Draw the losses on real text over tokens."""
    with figure(file, 1) as plot:
        for ((text, loss), results), ink in zip(arms(done).items(), INKS, strict=False):
            checks = [result["checks"] for result in results]
            curve = [mean([point[1] for point in points]) for points in zip(*checks, strict=True)]
            label = f"{TEXTS[text]}, {LOSSES[loss]}"
            plot.plot([point[0] / 1e6 for point in checks[0]], curve, color=ink, label=label)
        plot.set(xlabel="million tokens", ylabel="validation loss on novels, nats per token")
        plot.legend(fontsize=8)
