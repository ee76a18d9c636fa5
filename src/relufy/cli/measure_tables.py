"""The tables of `relufy measure`: means over layers, or every layer."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from relufy.cli.output import print_table, result

if TYPE_CHECKING:
    from relufy.measure.measurement import Measurement
    from relufy.measure.quality import Perplexity

Document = Mapping[str, Any]
PLACES = ("first_token", "first_percent", "rest")


def show(found: "Measurement", document: Document, by_layer: bool) -> None:
    """Print what was found, and what the names mean."""
    result(f"{found.model}: {found.tokens:,} tokens in {found.windows} windows of {found.window}")
    _show_quality(found)
    _show_sites(document)
    _show_neurons(document)
    _show_unions(document)
    _show_costs(found)
    _show_preactivations(document)
    _show_hidden(document, by_layer)
    if by_layer:
        _show_layers(found, document)
    for note in found.notes:
        result(f"note: {note}")
    for name, meaning in document["definitions"].items():
        result(f"{name}: {meaning}")


def _show_quality(found: "Measurement") -> None:
    zeros = found.zeros
    rows = [
        ["perplexity", _perplexity(found.perplexity)],
        ["perplexity of the dense model", _perplexity(found.dense_perplexity)],
        ["intrinsic_zero_fraction", f"{zeros.intrinsic_zero_fraction:.1%}"],
        ["gate_only_sparsity", f"{zeros.gate_only_sparsity:.1%}"],
        [
            "model_level_sparsity (p5, p95 over tokens)",
            f"{zeros.model_level_sparsity:.1%} ({zeros.model_level_p5:.1%}, {zeros.model_level_p95:.1%})",
        ],
    ]
    print_table("quality and sparsity", ["", "this model"], rows)


def _show_sites(document: Document) -> None:
    columns = ("mean", "p5", "p95", *PLACES)
    rows = [
        [site, *(_share(_mean(found[column])) for column in columns)]
        for site, found in document["sites"].items()
    ]
    names = ["site", "mean", "p5", "p95", "first token", "first 1 %", "rest"]
    print_table("exact zeros, means over layers; p5 and p95 over tokens", names, rows)


def _show_neurons(document: Document) -> None:
    rows = [
        [site, *(_share(_mean(found[name])) for name in ("dead", "live_sparsity", "live_p5", "live_p95"))]
        for site, found in document["neurons"].items()
    ]
    title = f"neurons over {document['tokens']:,} tokens, means over layers"
    print_table(title, ["site", "dead", "zeros of the live ones", "p5", "p95"], rows)


def _show_unions(document: Document) -> None:
    unions = document["unions"]
    columns = _united_columns(unions)
    sizes = sorted({size for found in columns.values() for size in found})
    rows = [[str(n), *(_share(_mean(found.get(n))) for found in columns.values())] for n in sizes]
    if rows:
        print_table("union density, means over layers", ["tokens", *columns], rows)


def _united_columns(unions: Document) -> dict[str, Mapping[int, Sequence[float]]]:
    """Return the columns by name, one for all sites whose densities are the same."""
    columns: dict[str, Mapping[int, Sequence[float]]] = {}
    for kind, name in (("consecutive", "consecutive tokens"), ("batches", "batches")):
        alike: list[tuple[list[str], Mapping[int, Sequence[float]]]] = []
        for site, found in unions[kind].items():
            same = next((sites for sites, other in alike if other == found), None)
            if same is None:
                alike.append(([site], found))
            else:
                same.append(site)
        columns |= {f"{' '.join(sites)}: {name}": found for sites, found in alike}
    return columns


def _show_costs(found: "Measurement") -> None:
    costs = {"macs_paper, M": found.macs_paper}
    costs |= {f"bytes_engine {dtype}, MB": cost for dtype, cost in (found.bytes_engine or {}).items()}
    parts = list(dict.fromkeys(part for cost in costs.values() for part in cost.parts))
    rows = [[part, *(_pair(cost.parts.get(part)) for cost in costs.values())] for part in parts]
    rows.append(["without head", *(_pair(cost.without_head) for cost in costs.values())])
    rows.append(["all", *(_pair(cost) for cost in costs.values())])
    rows.append(["dense / this", *(f"{cost.ratio:.2f}x" for cost in costs.values())])
    title = f"a token's cost at {found.context} positions: dense > this model"
    print_table(title, ["", *costs], rows)


def _show_preactivations(document: Document) -> None:
    found = document["preactivations"]
    predicted = [
        [f"shift {row['shift']:g}", _share(_mean(row["sparsity"])), ""] for row in found["predicted"]
    ]
    suggested = [
        [f"shift {row['shift']:.4g}", _share(row["sparsity"]), _range(row["shifts"], "{:.3g}".format)]
        for row in found["suggested"]
    ]
    names = ["relu(z - shift)", "sparsity", "each layer its own shift"]
    print_table("predicted sparsity, means over layers", names, [*predicted, *suggested])


def _show_hidden(document: Document, by_layer: bool) -> None:
    hidden = document["hidden"]
    columns = (*PLACES, "median")
    layers = range(len(hidden["median"]))
    if not by_layer:
        layers = [max(layers, key=lambda layer: hidden["first_token"][layer])]
    rows = [[f"layer {layer}", *(f"{hidden[name][layer]:.3g}" for name in columns)] for layer in layers]
    names = ["", "first token", "first 1 %", "rest", "median of |h|"]
    which = "by layer" if by_layer else "where the first token's is greatest"
    print_table(f"greatest |h| of a block's output, {which}", names, rows)


def _show_layers(found: "Measurement", document: Document) -> None:
    sparsity, neurons = document["sparsity"], document["neurons"]
    layers = document["preactivations"]["layers"]
    zeros = found.preactivations.sparsity()
    rows = [
        [
            str(layer),
            *(_share(sparsity[site][layer]) for site in sparsity),
            _share(neurons["neuron"]["dead"][layer]),
            f"{layers[layer]['mean']:.3g} \u00b1 {layers[layer]['deviation']:.3g}",
            _share(zeros[layer]),
        ]
        for layer in range(len(layers))
    ]
    print_table("exact zeros by layer", ["layer", *sparsity, "dead", "z", "z <= 0"], rows)


def _perplexity(found: "Perplexity | None") -> str:
    if found is None:
        return "-"
    return f"{found.perplexity:.2f} \u00b1 {found.perplexity * found.standard_error:.2f}"


def _pair(cost: Any) -> str:
    return "-" if cost is None else f"{cost.dense / 1e6:.3g} > {cost.sparse / 1e6:.3g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _range(values: Sequence[float], write: Callable[[float], str]) -> str:
    return f"{write(min(values))} to {write(max(values))}"


def _mean(values: Sequence[float | None] | None) -> float | None:
    """Return the mean over layers, of those that have a value."""
    known = [value for value in values or () if value is not None]
    return sum(known) / len(known) if known else None
