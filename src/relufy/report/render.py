"""The report page: demo.json in, one HTML file out, with nothing loaded from elsewhere."""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment

from relufy.report import plots
from relufy.report.page import environment, style

SITE_WORDS = {
    "neuron": "the activation function's output; a zero makes a row of up and a column of down unnecessary",
    "down": "the input of the down projection",
    "gate": "the input of the gate projection, which up shares",
    "up": "the input of the up projection",
    "q": "the input of the query projection, which key and value share",
    "k": "the input of the key projection",
    "v": "the input of the value projection",
    "o": "the input of the attention's output projection",
}


def render_demo(demo: Mapping[str, Any]) -> str:
    """Return the HTML of a demo's JSON document."""
    sparse = [variant for variant in demo["variants"] if variant["kl_before"]]
    loss = "KL to dense" if demo["texts"]["kind"] == "self" else "cross-entropy"
    drawn = {
        "bytes": plots.bytes_per_token(demo["variants"]),
        "kl": plots.kl_recovered(sparse) if demo["targets"] else "",
        "training": plots.training([v for v in sparse if v["training"]], loss),
        "speeds": plots.speeds(demo["variants"]),
        "sparsity": {v["name"]: plots.sparsity(v, demo["sparse_sites"]) for v in sparse},
    }
    words = {site: SITE_WORDS[site] for sites in demo["sparse_sites"] for site in sites}
    page = _environment().get_template("demo.html.jinja")
    return page.render(demo=demo, sparse=sparse, plots=drawn, site_words=words, style=style())


def _environment() -> Environment:
    found = environment()
    found.filters.update(
        mean=_mean,
        percent=lambda share, digits=0: f"{share:.{digits}%}",
        megabytes=lambda count: f"{count / 1e6:.2f} MB",
        million=lambda count: f"{count / 1e6:.2f} M",
        grouped=lambda count: f"{count:,}",
        fixed=lambda value, digits=2: f"{value:.{digits}f}",
        estimate=lambda e, digits=4: f"{e['value']:.{digits}f} \u00b1 {e['standard_error']:.{digits}f}",
    )
    return found


def _mean(shares: list[float] | None) -> float:
    return sum(shares) / len(shares) if shares else 0.0
