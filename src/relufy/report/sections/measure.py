"""`relufy measure`: zeros by layer and site, costs, unions, pre-activations."""

from collections.abc import Mapping
from typing import Any

from relufy.report.content import Figure, Section, Table, number, share, with_error
from relufy.report.lines import Curve, by_layer, curves, heatmap
from relufy.report.run import Run
from relufy.report.sections.histograms import histograms, predicted_curve

SITES = ("q", "k", "v", "o", "gate", "up", "neuron", "down")
SPARSITIES = ("intrinsic_zero_fraction", "gate_only_sparsity", "model_level_sparsity")


def section(run: Run) -> Section:
    """Return the section of a measurement."""
    found = run.document
    zeros = {site: found["sparsity"][site] for site in SITES if site in found["sparsity"]}
    return Section(
        title=f"Measured: {found['model']}",
        lead=f"{found['tokens']:,} tokens in {found['windows']:,} windows of {found['window']}.",
        tables=[_quality(found), _sites(found, zeros), *_places(found)],
        figures=[
            heatmap("Zeros by layer and site", zeros, "Share of exact zeros, a mean over tokens."),
            *_unions(found),
            *_neurons(found),
            *_preactivations(found),
        ],
        notes=found.get("notes", []),
        definitions=found.get("definitions", {}),
    )


def _quality(found: Mapping[str, Any]) -> Table:
    own, dense = found["perplexity"], found.get("dense_perplexity")
    rows = [
        ["perplexity", _perplexity(dense), _perplexity(own), ""],
        ["macs_paper a token, M", *_cost(found["macs_paper"])],
    ]
    for name, cost in _bytes(found).items():
        rows.append([f"bytes_engine a token, MB, {name}", *_cost(cost)])
    for name in SPARSITIES:
        if found.get(name) is not None:
            rows.append([name, "", share(found[name]), ""])
    return Table("Quality, cost and sparsity", ["", "dense", "this model", "dense / this"], rows)


def _perplexity(found: Mapping[str, Any] | None) -> str:
    if not found:
        return "-"
    error = found["standard_error"]
    return with_error(found["perplexity"], None if error is None else error * found["perplexity"])


def _bytes(found: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Return the costs in bytes by the weights' type; one measurement may have one type, or several."""
    cost = found.get("bytes_engine")
    if not cost:
        return {}
    return {found["dtype"]: cost} if "dense" in cost else dict(cost)


def _cost(cost: Mapping[str, float]) -> list[str]:
    dense, sparse = cost["dense"], cost["sparse"]
    return [number(dense / 1e6), number(sparse / 1e6), f"{dense / sparse:.2f}x"]


def _sites(found: Mapping[str, Any], zeros: Mapping[str, list[float]]) -> Table:
    """Return means over layers by site, with percentiles and the window's beginning where they are known."""
    details = found.get("sites") or {}
    columns = [name for name in ("p5", "p95", "first_token", "first_percent", "rest") if details]
    rows = []
    for site, values in zeros.items():
        more = [share(_mean(details[site][name])) for name in columns] if site in details else []
        rows.append([site, share(_mean(values)), share(min(values)), share(max(values)), *more])
    heads = [name.replace("_", " ") for name in columns]
    return Table("Zeros by site", ["site", "mean", "least layer", "greatest layer", *heads], rows)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _places(found: Mapping[str, Any]) -> list[Table]:
    """Return the greatest hidden states by place in the window, where they were measured."""
    hidden = found.get("hidden")
    if not hidden:
        return []
    rows = [
        [
            str(layer),
            *(number(hidden[name][layer]) for name in ("first_token", "first_percent", "rest", "median")),
        ]
        for layer in range(len(hidden["median"]))
    ]
    columns = ["layer", "first token", "first percent", "rest", "median"]
    return [Table("Greatest |hidden state| behind each block", columns, rows)]


def _unions(found: Mapping[str, Any]) -> list[Figure]:
    unions = found.get("unions") or {}
    figures = []
    titles = {"consecutive": "Union density of consecutive tokens", "batches": "Union density of a batch"}
    for name, title in titles.items():
        lines = [_union(site, by_count) for site, by_count in (unions.get(name) or {}).items() if by_count]
        lines = [line for line in lines if any(value < 1 for value in line.ys if value is not None)]
        if lines:
            caption = "Share of entries that are active at any of so many tokens, a mean over layers."
            words = "tokens" if name == "consecutive" else "sequences"
            figures.append(curves(title, lines, words, "union density", caption, log_x=True, percent=True))
    return figures


def _union(site: str, by_count: Mapping[str, list[float]]) -> Curve:
    counts = sorted(by_count, key=int)
    return Curve(site, [int(c) for c in counts], [_mean(by_count[c]) for c in counts], marker="o")


def _neurons(found: Mapping[str, Any]) -> list[Figure]:
    neurons = (found.get("neurons") or {}).get("neuron")
    if not neurons or not max(found["sparsity"]["neuron"]):
        return []
    lines = {"zeros": found["sparsity"]["neuron"], "zeros of live ones": neurons["live_sparsity"]}
    lines["dead neurons"] = neurons["dead"]
    caption = f"Dead: zero at every one of {neurons['tokens']:,} tokens."
    return [by_layer("Live and dead neurons", lines, "share of the neurons", caption)]


def _preactivations(found: Mapping[str, Any]) -> list[Figure]:
    layers = (found.get("preactivations") or {}).get("layers")
    return [histograms(layers), predicted_curve(layers)] if layers else []
