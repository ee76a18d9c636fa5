"""The paper's own figures as oracles of its account."""

import pytest

from relufy.measure.cost import macs_paper

OPT = {2.7: (2560, 32), 6.7: (4096, 32)}


def plain(d: int, layers: int, kv: int | None = None) -> list[dict]:
    kv = kv or d
    shapes = {"q": (d, d), "k": (kv, d), "v": (kv, d), "o": (d, d), "up": (4 * d, d), "down": (d, 4 * d)}
    return [shapes] * layers


def gated(d: int, f: int, layers: int) -> list[dict]:
    projections = {site: (d, d) for site in "qkvo"}
    return [{**projections, "gate": (f, d), "up": (f, d), "down": (d, f)}] * layers


LLAMA_7B = (gated(4096, 11008, 32), (32000, 4096))
FALCON_7B = (plain(4544, 32, 64), (0, 4544))  # the paper's figures leave Falcon's head out


def opt(size: float):
    d, layers = OPT[size]
    return plain(d, layers), (50272, d)


@pytest.mark.parametrize(
    ("model", "qkv", "up", "down", "printed"),
    [
        (LLAMA_7B, 0, 0, 0, 6.6),
        (LLAMA_7B, 0, 0, 0.62, 4.8),
        (LLAMA_7B, 0.51, 0.67, 0.65, 2.9),
        (FALCON_7B, 0, 0, 0.01, 6.6),
        (FALCON_7B, 0, 0, 0.94, 4.1),
        (FALCON_7B, 0.56, 0.56, 0.95, 2.2),
        (opt(6.7), 0, 0, 0.97, 4.5),
        (opt(6.7), 0.50, 0.40, 0.97, 2.8),
        (opt(2.7), 0, 0, 0.96, 1.8),
        (opt(2.7), 0.50, 0.35, 0.96, 1.1),
    ],
    ids=lambda value: str(value) if isinstance(value, float) else "",
)
def test_the_papers_table(model, qkv, up, down, printed):
    layers, head = model
    sites = {"q": qkv, "k": qkv, "v": qkv, "gate": up, "up": up, "down": down, "neuron": down}
    sparsity = {site: [share] * len(layers) for site, share in sites.items()}
    cost = macs_paper(layers, head, sparsity, has_sparse_inputs=up > 0)
    assert cost.sparse / 1e9 == pytest.approx(printed, abs=0.15)
    assert macs_paper(layers, head, {}, False).sparse == cost.dense


def test_up_skips_rows_of_neurons_alone():
    layers, head = LLAMA_7B
    zeros = [0.5] * len(layers)
    dense, down = (macs_paper(layers, head, sparsity, False).sparse for sparsity in ({}, {"down": zeros}))
    both = macs_paper(layers, head, {"down": zeros, "neuron": zeros}, False).sparse
    assert dense - both == pytest.approx(2 * (dense - down))


def test_the_paper_counts_o_as_dense():
    layers, head = LLAMA_7B
    cost = macs_paper(layers, head, {"o": [0.9] * len(layers)}, False)
    assert cost.sparse == cost.dense
