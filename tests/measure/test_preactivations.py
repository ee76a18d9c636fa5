"""Pre-activations: the paper's arithmetic as an oracle, exact histograms, predictions that hold."""

import json
import tracemalloc

import numpy as np
import pytest
import torch

import families
from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.errors import UserError
from relufy.measure.preactivations import (
    QUANTILES,
    PreActivations,
    compare_preactivations,
    measure_preactivations,
)
from relufy.measure.sparsity import measure_sparsity
from relufy.model.sites import find_sites
from relufy.model.sparsifiers import apply_sparsity
from relufy.schema import from_mapping, to_mapping

NORMAL_ZEROS = {0.0: 0.5, 0.1: 0.5398, 0.5: 0.6915, 1.0: 0.8413, 1.5: 0.9332}
"""A shifted ReLU on N(0, 1): the share of zeros at each shift."""


def windows_of(count: int = 12, length: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 53, (count, length))


def values_of(model, windows: np.ndarray) -> list[torch.Tensor]:
    """Return what the activation of each layer gets, for all positions at once."""
    seen: list[torch.Tensor] = []
    handles = [
        block.activation.module.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        for block in find_sites(model)
    ]
    with torch.inference_mode():
        model(torch.from_numpy(windows))
    for handle in handles:
        handle.remove()
    return seen


def with_normal_preactivations(std: float = 1.0, mean: float = 0.0):
    """Return a model whose gates put out what the test tells them to, whatever they read."""
    model = families.family("llama")
    generator = torch.Generator().manual_seed(0)
    for block in find_sites(model):
        assert block.gate is not None
        block.gate.module.register_forward_hook(
            lambda _m, _a, output: torch.randn(output.shape, generator=generator) * std + mean
        )
    return model


@pytest.mark.parametrize("layer", [0, 1])
def test_normal_preactivations_give_the_normal_distribution(layer: int) -> None:
    found = measure_preactivations(with_normal_preactivations(), windows_of(600), 100)
    assert found.tokens == 9600
    for shift, zeros in NORMAL_ZEROS.items():
        assert found.sparsity(shift)[layer] == pytest.approx(zeros, abs=0.003)
        assert found.layers[layer].value_at(zeros) == pytest.approx(shift, abs=0.01)
    assert found.layers[layer].mean == pytest.approx(0.0, abs=0.01)
    assert found.layers[layer].deviation == pytest.approx(1.0, abs=0.01)
    expected = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(QUANTILES)).tolist()
    assert found.layers[layer].quantiles == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt", "falcon"])
def test_histograms_count_the_values_exactly(name: str) -> None:
    model, windows = families.family(name), windows_of()
    found = measure_preactivations(model, windows, batch_size=5)
    values = [z.flatten().double().numpy() for z in values_of(model, windows)]
    assert len(found.layers) == len(values) == 2
    for layer, z in zip(found.layers, values, strict=True):
        assert layer.edges[0] < z.min() <= z.max() <= layer.edges[-1] and 0.0 in layer.edges
        assert 100 < len(layer.counts) == len(layer.edges) - 1 < 300
        assert sum(layer.counts) == len(z)
        inside = [np.sum((z > a) & (z <= b)) for a, b in zip(layer.edges, layer.edges[1:], strict=False)]
        assert np.abs(np.array(inside) - layer.counts).sum() <= 2  # batches may round differently
        assert layer.mean == pytest.approx(z.mean(), abs=1e-5)
        assert layer.deviation == pytest.approx(z.std(), rel=1e-5)


@pytest.mark.parametrize("shift", [0.0, -0.7, 1.3])
def test_the_first_layer_is_as_sparse_as_predicted(shift: float) -> None:
    """Later layers read what the earlier ones' new zeros made of the hidden states."""
    model, windows = families.family("llama"), windows_of()
    found = measure_preactivations(model, windows)
    sparsity = ActivationSparsity((Sparsifier(("neuron",), "relu", shift=shift),))
    measured = measure_sparsity(apply_sparsity(model, sparsity), windows).sparsity["neuron"]
    assert found.sparsity(shift)[0] == pytest.approx(measured[0], abs=1e-12 if shift == 0 else 2e-3)
    assert found.sparsity(shift)[1] == pytest.approx(measured[1], abs=0.1)


def test_a_shift_is_found_for_a_sparsity() -> None:
    found = measure_preactivations(families.family("llama"), windows_of())
    for wanted in (0.05, 0.5, 0.9, 0.99):
        assert found.mean_sparsity(found.shift_for(wanted)) == pytest.approx(wanted, abs=1e-9)
        assert found.sparsity(found.shifts_for(wanted)) == pytest.approx((wanted, wanted), abs=1e-9)
    with pytest.raises(UserError, match="between 0 and 1, found 1"):
        found.shift_for(1.0)


def test_a_movement_is_what_moved() -> None:
    windows = windows_of(200)
    before = measure_preactivations(with_normal_preactivations(), windows, 100)
    after = measure_preactivations(with_normal_preactivations(0.5, -0.5), windows, 100)
    assert all(layer.distance == 0 for layer in compare_preactivations(before, before))
    for layer in compare_preactivations(before, after):
        assert (layer.mean_before, layer.mean_after) == pytest.approx((0, -0.5), abs=0.02)
        assert (layer.deviation_before, layer.deviation_after) == pytest.approx((1, 0.5), rel=0.02)
        assert (layer.sparsity_before, layer.sparsity_after) == pytest.approx((0.5, 0.8413), abs=0.02)
        assert layer.distance == pytest.approx(0.8812 - 0.5360, abs=0.01)  # at 0.0904: the densities cross
    shallow = PreActivations(before.tokens, before.layers[:1])
    with pytest.raises(UserError, match="2 and 1 layers are not of one model"):
        compare_preactivations(before, shallow)


def test_json_keeps_all_of_it() -> None:
    found = measure_preactivations(families.family("gpt2"), windows_of(2))
    assert from_mapping(PreActivations, json.loads(json.dumps(to_mapping(found))), "test") == found


def test_memory_does_not_grow_with_the_text() -> None:
    def peak(count: int) -> int:
        model, windows = families.family("llama"), windows_of(count)
        tracemalloc.start()
        measure_preactivations(model, windows)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(16)
    assert peak(512) < peak(16) + 200_000


def test_nothing_stays_on_the_model_and_what_is_no_number_is_refused() -> None:
    model = families.family("llama").train()
    measure_preactivations(model, windows_of(2))
    assert model.training and not any(m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        find_sites(model)[1].gate.module.weight[0, 0] = torch.nan  # type: ignore[index,operator,union-attr]
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.act_fn gets NaN"):
        measure_preactivations(model, windows_of(2))
    with pytest.raises(UserError, match="at least one window"):
        measure_preactivations(model, windows_of(0))
