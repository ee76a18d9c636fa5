"""Check 7: planted sinks and massive activations are told, and where there are none, none."""

import torch
from patients import llama, patient_of, with_sink

from relufy.doctor import first_tokens


def test_a_planted_sink_is_told() -> None:
    found = first_tokens.check(patient_of(with_sink()))
    assert found.figures["sink_layers"] == [0, 1] and found.status != "good"
    assert min(found.figures["attention_on_first"]) > 0.9
    assert "attention sink in 2 of 2 layers" in found.verdict


def test_massive_activations_are_told() -> None:
    figures = first_tokens.check(patient_of(with_sink())).figures
    assert figures["massive_layers"] == [0, 1] and figures["greatest_at_first"] > 4000
    assert figures["massive_elsewhere_by_layer"] == [0, 0]


def test_where_there_is_no_sink_none_is_told() -> None:
    found = first_tokens.check(patient_of(llama()))
    assert found.figures["sink_layers"] == [] and "No attention sink" in found.verdict
    assert found.figures["massive_layers"] == []


def test_the_model_is_left_as_it_was() -> None:
    patient = patient_of(llama())
    own = patient.model.config._attn_implementation
    first_tokens.check(patient)
    assert patient.model.config._attn_implementation == own
    assert not any(module._forward_pre_hooks for module in patient.model.modules())


def test_a_dense_first_token_is_left_alone() -> None:
    patient = patient_of(llama())
    patient.scored.begin(1, 0, 4)
    x = torch.randn(1, 4, 24)
    masked = first_tokens._least_left_out(patient, 1)(x)
    assert torch.equal(masked[:, 0], x[:, 0])
    assert ((masked[:, 1:] == 0).sum(-1) == 12).all()
