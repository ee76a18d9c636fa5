"""Scores of low rank, their thresholds and their training: what they promise on layers made for it."""

import numpy as np
import pytest
import torch

from relufy.measure.prediction.calibrate import measure_curves, measure_predictors
from relufy.measure.prediction.curve import LEAST_OFFSET, MarginCurve
from relufy.measure.prediction.svd import gate_of, measure_moments, plain_svd_scorer, svd_scorer
from relufy.measure.prediction.training import Training, train_scorers
from relufy.model.checkpoint import load_model
from relufy.model.configuration import sparsity_of
from relufy.model.predictor import predictable_layers
from relufy.model.sites import find_sites

RECALLS = (0.5, 0.9, 0.99, 1.0)


@pytest.fixture
def model(make_checkpoint):
    return load_model(make_checkpoint(recipe="shifted"))


def layers_of(model):
    return predictable_layers(find_sites(model), sparsity_of(model))


def windows(seed: int = 0, count: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, 513, (count, 32))


def test_at_full_rank_margins_are_the_preactivations(model):
    layers = layers_of(model)
    for layer, moments in zip(layers, measure_moments(model, layers, windows()), strict=True):
        x = torch.randn(50, layer.hidden)
        weight, bias = gate_of(layer)
        z = x.double() @ weight.T + bias - 0.05
        for scorer in (svd_scorer(layer, layer.hidden, moments), plain_svd_scorer(layer, layer.hidden)):
            is_far = z.abs() > 1e-3
            assert torch.equal((scorer.margins(x) > 0)[is_far], (z > 0)[is_far])


def test_the_text_makes_a_better_decomposition(model):
    """The mean square of what a text's pre-activations lose, in units of each neuron's own deviation."""
    layers = layers_of(model)
    moments = measure_moments(model, layers, windows())
    for layer, seen in zip(layers, moments, strict=True):
        weight, _ = gate_of(layer)
        covariance = seen.covariance()
        deviations = (weight @ covariance * weight).sum(1).sqrt()

        def loss(scorer, unit, weight=weight, covariance=covariance, deviations=deviations):
            lost = weight - scorer.outer.double() @ scorer.inner.double() * unit
            return float(((lost @ covariance * lost).sum(1) / deviations**2).mean())

        found = loss(svd_scorer(layer, 8, seen), deviations[:, None])
        assert found < loss(plain_svd_scorer(layer, 8), 1.0)


@pytest.mark.parametrize("weighted", [False, True])
def test_thresholds_give_the_recall(weighted, model):
    layers = layers_of(model)
    scorers = {
        layer.index: svd_scorer(layer, 8, moments)
        for layer, moments in zip(layers, measure_moments(model, layers, windows()), strict=True)
    }
    curves = measure_curves(model, layers, scorers, windows(1))
    densities = []
    for recall in RECALLS:
        offsets = {index: curve.offset_for(recall, weighted) for index, curve in curves.items()}
        predictors = {index: scorers[index].predictor(offset) for index, offset in offsets.items()}
        found = measure_predictors(model, layers, predictors, windows(1))
        for index, quality in found.items():
            reached = quality.weighted_recall if weighted else quality.recall
            assert recall - 1e-4 <= reached <= recall + 0.03
            told = curves[index].at(offsets[index])
            assert (told.recall, told.density) == pytest.approx((quality.recall, quality.density), abs=1e-3)
        densities.append(np.mean([quality.density for quality in found.values()]))
    assert densities == sorted(densities)


def test_bins_are_ordered_and_cut_below_their_values():
    margins = torch.tensor([[-3.0, -1e-3, 0.0, 1e-3, 2.5, 7.0]])
    curve = MarginCurve()
    curve.add(margins, torch.tensor([[1.0, 0, 1, 1, 0, 1]]))
    for recall, least in ((0.25, 7.0), (0.5, 1e-3), (0.75, 0.0), (1.0, -3.0)):
        offset = curve.offset_for(recall)
        assert least - 0.03 * abs(least) - 1e-9 <= offset <= least
    assert curve.at(7.0).precision == 1.0 and curve.at(-1.0).density == pytest.approx(5 / 6)
    assert MarginCurve().offset_for(0.9) == LEAST_OFFSET


def test_training_needs_fewer_candidates_and_is_seeded(model):
    layers = layers_of(model)
    text, held_out = windows(2, 40), windows(3)
    moments = measure_moments(model, layers, text)
    start = {layer.index: svd_scorer(layer, 4, seen) for layer, seen in zip(layers, moments, strict=True)}
    training = Training(rounds=3, learning_rate=3e-3, batch_positions=128)
    runs = [train_scorers(model, layers, start, text, held_out, 0.9, training) for _ in range(2)]
    assert all(torch.equal(runs[0][i].outer, runs[1][i].outer) for i in start)

    def density(scorers):
        curves = measure_curves(model, layers, scorers, held_out)
        return [curve.at(curve.offset_for(0.9)).density for curve in curves.values()]

    assert sum(density(runs[0])) < sum(density(start))
    assert all(new <= old for new, old in zip(density(runs[0]), density(start), strict=True))
