"""Measured sparsity is a property of model and text, not of how the text was batched."""

import numpy as np
import pytest

import families
from relufy.measure.sparsity import measure_sparsity
from relufy.methods.sparsify import sparsify

WINDOWS = np.random.default_rng(0).integers(0, 53, (5, 7))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 17])
def test_the_batch_size_does_not_matter(batch_size: int) -> None:
    model = sparsify(families.family("llama"), "relufy-stage2")
    found, expected = measure_sparsity(model, WINDOWS, batch_size), measure_sparsity(model, WINDOWS, 5)
    assert found.tokens == expected.tokens == 35
    for site, layers in expected.sparsity.items():
        assert found.sparsity[site] == pytest.approx(layers, abs=1e-3)


def test_sites_and_mean() -> None:
    dense = measure_sparsity(families.family("llama"), WINDOWS)
    assert list(dense.sparsity) == ["q", "k", "v", "o", "gate", "neuron", "up", "down"]
    assert set(dense.mean.values()) == {0.0}
    stage1 = measure_sparsity(sparsify(families.family("llama"), "relufy-stage1"), WINDOWS)
    assert stage1.sparsity["neuron"] == stage1.sparsity["down"]
    assert stage1.mean["neuron"] == pytest.approx(sum(stage1.sparsity["neuron"]) / 2)
    assert 0.3 < stage1.mean["neuron"] < 0.7
    assert stage1.mean["gate"] == 0.0


@pytest.mark.parametrize("name", ["gpt2", "falcon", "opt", "phi3", "olmo2"])
def test_other_families(name: str) -> None:
    model = families.family(name)
    if name != "opt":
        sparsify(model, "relufy-stage1")
    found = measure_sparsity(model, WINDOWS, 2)
    assert found.tokens == 35
    assert ("gate" in found.sparsity) == (name in families.GATED)
    assert found.sparsity["neuron"] == found.sparsity["down"]


def test_the_training_mode_is_kept() -> None:
    model = families.family("llama").train()
    measure_sparsity(model, WINDOWS)
    assert model.training
