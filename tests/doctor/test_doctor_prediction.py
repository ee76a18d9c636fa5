"""Check 2: what can be predicted is, what cannot is not, and each costs what it costs."""

import pytest
import torch
from patients import llama, patient_of
from tests.families import family

from relufy.doctor import prediction
from relufy.doctor.neuron_predictor import fit_neuron_predictors, predicted_masks
from relufy.doctor.ridge import Ridge


def test_ridge_finds_a_linear_map() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, generator=generator) for size in ((400, 5), (5, 3)))
    ridge = Ridge()
    for part in x.split(90):
        ridge.add(part, part @ weight + 2.0)
    torch.testing.assert_close(ridge.solve()[:5], weight, atol=0.02, rtol=0.0)


@torch.no_grad()
def test_neurons_that_always_matter_are_predicted() -> None:
    """Planted: in every layer the same neurons have large columns of down."""
    model = llama()
    for layer in model.model.layers:
        layer.mlp.down_proj.weight[:, 21:] *= 1e-4
    figures = prediction.check(patient_of(model, wrote_it=True)).figures
    assert min(figures["recall"]) > 0.95 and min(figures["precision"]) > 0.95
    assert figures["predicted"]["nats_more"] < 0.05 * figures["random"]["nats_more"]


def test_the_oracle_costs_least_and_drawn_neurons_most() -> None:
    figures = prediction.check(patient_of(llama(), wrote_it=True)).figures
    costs = [figures[name]["nats_more"] for name in ("oracle", "predicted", "random")]
    assert costs == sorted(costs)
    assert figures["cost_of_not_knowing"] == pytest.approx(costs[1] - costs[0])


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "falcon"])
def test_as_many_neurons_are_kept_as_was_said(name: str) -> None:
    patient = patient_of(family(name))
    layers = fit_neuron_predictors(patient, 10, 4)
    with predicted_masks(patient, layers):
        patient.run()
    tokens = patient.test.shape[0] * (patient.test.shape[1] - 1)
    assert [layer.overlap.chosen for layer in layers] == [10 * tokens] * 2
    assert not any(module._forward_pre_hooks for module in patient.model.modules())


def test_a_relu_model_is_sent_to_the_predictor_that_knows_the_gate() -> None:
    found = prediction.check(patient_of(llama(hidden_act="relu")))
    assert found.figures["left_out"] >= 0.5 and "relufy predictor" in found.advice[0]
