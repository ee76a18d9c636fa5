"""The four meanings of sparsity, each against a count of its own."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import families
from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.measure.definitions import measure_zeros
from relufy.measure.modes import Scored, window_losses
from relufy.measure.site_weights import site_weights
from relufy.measure.sparsity import measure_sparsity
from relufy.method import Relufication
from relufy.methods.sparsify import sparsify
from relufy.model.sites import find_sites
from relufy.model.sparsifiers import apply_sparsity, sparsity_tensors
from relufy.model.structure import find_blocks

WINDOWS = np.random.default_rng(2).integers(3, 53, (6, 16))
ALL = Scored("all", 16)


def with_masks(*masks: Sparsifier, name: str = "llama"):
    model, sparsity = families.family(name), ActivationSparsity(masks)
    tensors = {
        name: 0.1 * torch.randn([4 if size is None else size for size in shape])
        for name, shape in sparsity_tensors(find_sites(model), sparsity).items()
    }
    return apply_sparsity(model, sparsity, tensors)


def test_half_of_the_neurons_of_llama_2_7b_is_22_percent_of_its_weights() -> None:
    """R-Sparse prints 22 % for CATS at 50 %."""
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=1, vocab_size=8)
    with torch.device("meta"):
        weights = site_weights(find_blocks(LlamaForCausalLM(config))[0])
    assert 0.5 * (weights["up"] + weights["down"]) / sum(weights.values()) == pytest.approx(0.223, abs=5e-4)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_the_weights_of_sites_are_those_of_the_projections(name: str) -> None:
    for block in find_blocks(families.family(name)):
        projections = {p.name: p.shape[0] * p.shape[1] for p in block.projections().values()}
        weights = site_weights(block)
        assert sum(weights.values()) == sum(projections.values())
        assert weights["k"] == weights["v"] and weights["q"] == weights["o"]


def test_a_dense_model_has_no_zeros() -> None:
    zeros, losses = measure_zeros(families.family("llama"), WINDOWS, ALL)
    found = zeros.intrinsic_zero_fraction, zeros.gate_only_sparsity, zeros.model_level_sparsity
    assert found == (0, 0, 0)
    assert losses == window_losses(families.family("llama"), WINDOWS, ALL)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "falcon_new"])
def test_shares_of_sites_are_what_measure_counts(name: str) -> None:
    model = sparsify(families.family(name), Relufication(stage=2))
    zeros, _ = measure_zeros(model, WINDOWS, ALL, batch_size=4)
    expected = measure_sparsity(model, WINDOWS[:, :-1]).sparsity
    assert set(zeros.sites) == set(expected) and zeros.tokens == 6 * 15
    for site, shares in expected.items():
        assert zeros.sites[site] == pytest.approx(shares, abs=1e-9)
    assert zeros.intrinsic_zero_fraction == pytest.approx(np.mean(expected["down"]))
    assert zeros.gate_only_sparsity == pytest.approx(np.mean(expected["neuron"]))


def test_model_level_counts_rows_of_up_by_neurons_and_all_else_by_inputs() -> None:
    model = with_masks(
        Sparsifier(("neuron",), "threshold", threshold=0.3),
        Sparsifier(("up",), "threshold", threshold=0.9),
        Sparsifier(("o",), "threshold", threshold=0.5),
    )
    zeros, _ = measure_zeros(model, WINDOWS, ALL)
    weights = site_weights(find_blocks(model)[0])
    unread = sum(
        weights["up"] * zeros.sites["neuron"][layer]
        + sum(weights[site] * zeros.sites[site][layer] for site in ("q", "k", "v", "o", "gate", "down"))
        for layer in range(2)
    )
    assert zeros.sites["up"][0] > 0 and zeros.sites["o"][0] > 0
    assert zeros.model_level_sparsity == pytest.approx(unread / (2 * sum(weights.values())))
    assert zeros.model_level_p5 < zeros.model_level_sparsity < zeros.model_level_p95


def test_with_the_same_number_in_every_token_the_percentiles_are_the_mean() -> None:
    inputs = ("q", "k", "v", "gate", "up")
    zeros, _ = measure_zeros(with_masks(Sparsifier(inputs, "topk", k=6)), WINDOWS, ALL)
    weights = site_weights(find_blocks(families.family("llama"))[0])
    expected = 0.75 * sum(weights[site] for site in inputs) / sum(weights.values())
    found = zeros.model_level_p5, zeros.model_level_sparsity, zeros.model_level_p95
    assert found == pytest.approx((expected,) * 3)


def test_low_rank_branches_are_read() -> None:
    plain = with_masks(Sparsifier(("o",), "topk", k=6))
    corrected = with_masks(Sparsifier(("o",), "topk", k=6, correction="low_rank"))
    found = [measure_zeros(model, WINDOWS, ALL)[0].model_level_sparsity for model in (plain, corrected)]
    weights = site_weights(find_blocks(plain)[0])
    assert found[0] - found[1] == pytest.approx(4 * (24 + 24) / sum(weights.values()))


@pytest.mark.parametrize(
    ("mode", "changes"), [("second-half", {"dense_first_tokens": 8}), ("decode", {"phase": "decode"})]
)
def test_dense_halves_and_prompts_are_not_counted(mode: str, changes: dict) -> None:
    zeros, _ = measure_zeros(
        with_masks(Sparsifier(("o",), "topk", k=6, **changes)), WINDOWS, Scored(mode, 16)
    )
    assert zeros.tokens == 6 * 7
    assert zeros.sites["o"] == (0.75, 0.75)
