"""Results in short: what the documents of docs/studies are made from, small enough to be kept with them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from relufy.measure.preactivations import LayerPreActivations
from relufy.schema import from_mapping


@dataclass(frozen=True)
class Seeds:
    """A mean over seeds and its standard error (NaN for a single one)."""

    mean: float
    error: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> "Seeds":
        mean = math.fsum(values) / len(values)
        if len(values) == 1:
            return Seeds(mean, math.nan, 1)
        variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
        return Seeds(mean, math.sqrt(variance / len(values)), len(values))

    def against(self, control: "Seeds") -> str:
        """Return how much greater the perplexity is than a control's, both given as nats, in percent."""
        change = math.exp(self.mean - control.mean)
        error = "" if self.count == 1 else f" ± {100 * change * math.hypot(self.error, control.error):.2f}"
        return f"{100 * (change - 1):+.2f}{error} %"

    def text(self, digits: int = 4) -> str:
        """Return "mean ± error" as it is printed in a table."""
        error = "" if math.isnan(self.error) else f" ± {self.error:.{digits}f}"
        return f"{self.mean:.{digits}f}{error}"


def short(result: dict[str, Any]) -> dict[str, Any]:
    """Return a job's result without what only the job itself needs."""
    job = result["job"]
    return {
        "start": job["start"],
        "activation": job["activation"],
        "sparsify": job["sparsify"],
        "finetune": job["finetune"],
        "tokens": result["tokens"],
        "checks": [[tokens, round(nats, 4)] for tokens, nats in result["checks"]],
        "penalty_strength": result["curve"][-1].get("penalty_strength"),
        "before": result["before"] and _figures(result["before"]),
        "final": _figures(result["final"]),
        "after": [_figures(after) for after in result["after"]],
        "preactivations": {when: _shares(found) for when, found in result["preactivations"].items()},
    }


GRID = [round(-10 + 0.25 * step, 2) for step in range(57)]
"""Where a distribution of pre-activations is kept: -10 to 4."""


def _shares(found: dict[str, Any]) -> list[float]:
    """Return the share of pre-activations at or below each value of GRID, a mean over layers."""
    layers = [from_mapping(LayerPreActivations, layer, "layer") for layer in found["layers"]]
    shares = [layer.shares_at_most(GRID) for layer in layers]
    return [round(mean(values), 4) for values in zip(*shares, strict=True)]


def _figures(found: dict[str, Any]) -> dict[str, Any]:
    """Return an evaluation's figures; sites and layers as means."""
    return {
        "nats": round(found["nats"], 5),
        "standard_error": round(found["standard_error"], 5),
        "valid": round(found["valid"], 5),
        "sparsity": {site: round(mean(layers), 5) for site, layers in found["sparsity"].items()},
        "sparsity_neuron_by_layer": [round(share, 4) for share in found["sparsity"]["neuron"]],
        "dead": round(mean(found["dead"]), 5) if found["dead"] else None,
        "live_sparsity": round(mean(found["live_sparsity"]), 5) if found["live_sparsity"] else None,
        "union_density": round(mean(found["union_density"]), 5) if found["union_density"] else None,
        "macs_paper": found["macs_paper"],
        "cett": found["cett"] and round(found["cett"], 5),
    }


def nats(results: Sequence[dict[str, Any]]) -> Seeds:
    """Return the test loss of an arm's results, one for each seed."""
    return Seeds.of([result["final"]["nats"] for result in results])


def share(results: Sequence[dict[str, Any]], name: str, digits: int = 1) -> str:
    """Return a mean over results in percent: "dead", "union_density" and the like, or a site's zeros."""
    values = [r["final"]["sparsity"].get(name, r["final"].get(name)) for r in results]
    known = [value for value in values if value is not None]
    return percent(mean(known), digits) if known else ""


def compared(results: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Return a table of single runs, each with its label: losses against the first one's, and zeros."""
    base = nats([results[0][1]])
    rows = []
    for label, result in results:
        loss, rate = nats([result]), f"{result['finetune']['learning_rate']:g}"
        against = loss.against(base) if rows else ""
        shares = [share([result], key, d) for key, d in (("neuron", 1), ("dead", 2), ("union_density", 1))]
        rows.append([label, rate, loss.text(), perplexity(loss), against, *shares])
    columns = ["", "learning rate", "test loss, nats", "perplexity", "against dense"]
    return table([*columns, "zeros", "dead", "used in 8 tokens"], rows)


def perplexity(found: Seeds) -> str:
    return f"{math.exp(found.mean):.2f}"


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"
