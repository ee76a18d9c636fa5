"""The paper's own figures as oracles of its account."""

import pytest

from relufy.measure.cost import Cost, macs_paper

OPT = {1.3: (2048, 24), 2.7: (2560, 32), 6.7: (4096, 32)}


def plain(d: int, layers: int, kv: int | None = None) -> list[dict]:
    kv = kv or d
    shapes = {"q": (d, d), "k": (kv, d), "v": (kv, d), "o": (d, d), "up": (4 * d, d), "down": (d, 4 * d)}
    return [shapes] * layers


def gated(d: int, f: int, layers: int) -> list[dict]:
    projections = {site: (d, d) for site in "qkvo"}
    return [{**projections, "gate": (f, d), "up": (f, d), "down": (d, f)}] * layers


LLAMA_7B = (gated(4096, 11008, 32), (32000, 4096))
FALCON_7B = (plain(4544, 32, 64), (65024, 4544))


def opt(size: float):
    d, layers = OPT[size]
    return plain(d, layers), (50272, d)


TABLE_1 = {
    "Llama 7B": (LLAMA_7B, (0, 0, 0), (6.476, 6.607), 6.6),
    "Llama 7B s1": (LLAMA_7B, (0, 0.62, 0), (4.687, 4.818), 4.8),
    "Llama 7B s2": (LLAMA_7B, (0.51, 0.65, 0.67), (2.783, 2.914), 2.9),
    "Falcon 7B": (FALCON_7B, (0, 0, 0), (6.626, 6.921), 6.6),
    "Falcon 7B s1": (FALCON_7B, (0, 0.94, 0), (4.142, 4.437), 4.1),
    "Falcon 7B s2": (FALCON_7B, (0.56, 0.95, 0.56), (2.255, 2.550), 2.2),
    "OPT 6.7B": (opt(6.7), (0, 0.97, 0), (4.359, 4.565), 4.5),
    "OPT 6.7B s2": (opt(6.7), (0.50, 0.97, 0.40), (2.695, 2.901), 2.8),
    "OPT 2.7B": (opt(2.7), (0, 0.96, 0), (1.711, 1.840), 1.8),
    "OPT 2.7B s2": (opt(2.7), (0.50, 0.96, 0.35), (1.103, 1.232), 1.1),
    "OPT 1.3B": (opt(1.3), (0, 0.96, 0), (0.821, 0.924), None),
}
"""Row -> model, sparsities of qkv, down and up, G without and with head as derived from the formulas, and as
printed. (OPT 1.3B is printed as 1.3, the count of the dense model with head.)"""


def table_cost(row: str) -> Cost:
    (layers, head), (qkv, down, up), _, _ = TABLE_1[row]
    sites = {"q": qkv, "k": qkv, "v": qkv, "gate": up, "up": up, "down": down, "neuron": down}
    sparsity = {site: [share] * len(layers) for site, share in sites.items()}
    return macs_paper(layers, head, sparsity, has_sparse_inputs=up > 0)


@pytest.mark.parametrize("row", TABLE_1)
def test_the_papers_table(row: str) -> None:
    cost, (_, _, derived, printed) = table_cost(row), TABLE_1[row]
    found = cost.without_head.sparse / 1e9, cost.sparse / 1e9
    assert found == pytest.approx(derived, abs=1e-3)
    if printed is not None:
        assert min(abs(value - printed) for value in found) <= 0.15


def test_the_dense_model_has_no_zeros() -> None:
    for (layers, head), *_ in TABLE_1.values():
        cost = macs_paper(layers, head, {}, False)
        assert cost.sparse == cost.dense


def test_opt_1_3b_is_printed_as_the_dense_model() -> None:
    assert table_cost("OPT 1.3B").dense / 1e9 == pytest.approx(1.311, abs=1e-3)


def test_a_cost_is_the_sum_of_its_parts() -> None:
    cost = table_cost("Llama 7B s2")
    assert list(cost.parts) == ["q", "k", "v", "o", "gate", "up", "down", "head"]
    assert sum(part.sparse for part in cost.parts.values()) == pytest.approx(cost.sparse)
    assert cost.parts["down"].sparse == pytest.approx(0.35 * 32 * 4096 * 11008)
    assert cost.parts["o"].sparse == cost.parts["o"].dense == 32 * 4096**2
    assert cost.parts["head"].sparse == cost.sparse - cost.without_head.sparse == 32000 * 4096


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
