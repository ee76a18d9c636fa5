"""Checks 5 and 6: the knee, and text that a model writes by itself."""

import numpy as np
import pytest
from patients import llama, patient_of

from relufy.doctor import generation, sweep
from relufy.doctor.continuation import agreement, continue_greedily, greedy_matches


def test_the_knee_lies_where_the_rise_passes_what_is_allowed() -> None:
    assert sweep.knee((0.5, 0.9), (0.005, 0.025), 0.01) == pytest.approx(0.6)
    assert sweep.knee((0.5, 0.9), (0.02, 0.05), 0.01) == pytest.approx(0.25)
    assert sweep.knee((0.5, 0.9), (-0.01, 0.01), 0.01) == 0.9
    assert sweep.knee((0.5, 0.9), (0.0, float("nan")), 0.01) != 0.9


def test_those_who_know_lose_less_than_those_who_draw() -> None:
    figures = sweep.check(patient_of(llama(), wrote_it=True)).figures
    pairs = zip(figures["rise"], figures["rise_of_random"], strict=True)
    assert all(oracle < random for oracle, random in pairs)


def test_a_relu_model_loses_nothing_up_to_its_own_zeros() -> None:
    patient = patient_of(llama(hidden_act="relu"))
    figures = sweep.check(patient).figures
    assert figures["levels"][0] < figures["own_zeros"] and abs(figures["rise"][0]) < 1e-4


def test_the_control_has_its_own_curve() -> None:
    control = patient_of(llama(hidden_act="relu"), wrote_it=True)
    found = sweep.check(patient_of(llama(), wrote_it=True), control)
    assert found.figures["control"]["knee"] > found.figures["knee"]
    assert any("activation is the limit" in line for line in found.advice)


def test_a_model_agrees_with_itself() -> None:
    model = llama()
    found = generation.check(patient_of(model, dense=model), 0.5)
    assert found.figures["same_so_far"] == [1.0] * 6 and found.figures["drift"] == 0.0
    assert found.figures["teacher_forced_agreement"] == 1.0


def test_masks_work_while_a_model_writes() -> None:
    """What is left out at every step is what is left out of the whole text at once."""
    patient = patient_of(llama())
    prompts = patient.test[:2, :10]
    written = continue_greedily(patient.model, prompts, 6, generation._left_out(patient, 0.6))
    assert greedy_matches(patient.model, prompts, written, generation._left_out(patient, 0.6)) == 1.0
    assert (written != continue_greedily(patient.model, prompts, 6)).any()


def test_texts_agree_until_they_part() -> None:
    first, second = np.array([[1, 2, 3], [1, 2, 3]]), np.array([[1, 9, 3], [1, 2, 3]])
    assert agreement(first, second) == ([1.0, 0.5, 0.5], [1, 3])
