"""Check 1 and the activation: what was planted is what is told."""

import pytest
from patients import llama, patient_of, with_dead_layer, with_uneven_layers

from relufy.doctor import activation, layers
from relufy.measure.cett import cett_at, cett_sparsity


def test_a_dead_layer_is_named() -> None:
    found = layers.check(patient_of(with_dead_layer(1)))
    assert found.status == "bad" and found.advice
    assert "Layer 1 is dead: 100 % of the neurons never fire" in found.verdict
    assert found.figures["dead_share"][1] == 1.0
    assert max(found.figures["dead_share"][0], found.figures["dead_share"][2]) < 0.5


def test_no_layer_is_called_dead_where_none_is() -> None:
    found = layers.check(patient_of(llama()))
    assert found.figures["dead_share"] == [0.0, 0.0] and "dead" not in found.verdict


def test_one_epsilon_for_uneven_layers_is_a_mistake() -> None:
    found = layers.check(patient_of(with_uneven_layers()))
    universal = found.figures["sparsity_at_universal_epsilon"]
    assert found.status == "watch" and universal[0] > universal[1] + 0.3
    assert "teal" in found.advice[0]


def test_the_universal_epsilon_has_the_target_as_its_mean_error() -> None:
    figures = layers.check(patient_of(llama())).figures
    errors = figures["cett_at_universal_epsilon"]
    assert sum(errors) / len(errors) == pytest.approx(figures["cett_target"], abs=0.03)
    assert sum(errors) / len(errors) <= figures["cett_target"]


def test_cett_at_a_layers_own_epsilon_is_what_the_search_found() -> None:
    patient = patient_of(llama())
    own = cett_sparsity(patient.model, patient.test)
    errors, shares = cett_at(patient.model, patient.test, own.epsilon)
    for layer in range(2):
        assert errors[layer, layer] == pytest.approx(own.error[layer])
        assert shares[layer, layer] == pytest.approx(own.sparsity[layer])


def test_an_activation_without_zeros_is_told_what_a_relu_would_make() -> None:
    patient = patient_of(llama())
    found = activation.check(patient)
    assert found.status == "bad" and "silu makes no exact zeros" in found.verdict
    assert found.figures["predicted_relu_sparsity"] == patient.preactivations.mean_sparsity()
    assert any("relufy-stage1" in line for line in found.advice)


def test_the_prediction_is_what_the_swap_makes() -> None:
    """ReLU Strikes Back 5.1, without a fine-tune: the share of z <= 0, in the first layer exactly."""
    import relufy
    from relufy.measure.sparsity import measure_sparsity

    model = llama()
    patient = patient_of(model)
    predicted = activation.check(patient).figures["predicted_relu_sparsity_by_layer"]
    relufy.sparsify(model, "relufy-stage1")
    assert measure_sparsity(model, patient.fit).sparsity["neuron"][0] == pytest.approx(predicted[0], abs=1e-6)


def test_a_relu_needs_no_swap() -> None:
    found = activation.check(patient_of(llama(hidden_act="relu")))
    assert "relu makes" in found.verdict
    assert found.figures["gate_only_sparsity"] == pytest.approx(0.5, abs=0.1)
