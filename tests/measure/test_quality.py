"""Perplexity and fidelity against their definitions, computed by hand."""

import copy
import math

import numpy as np
import pytest
import torch

from families import family
from relufy.errors import UserError
from relufy.measure.quality import fidelity, paired_difference, perplexity
from relufy.method import Relufication
from relufy.methods.sparsify import sparsify

VOCAB = 53


@pytest.fixture
def model():
    return family("llama")


@pytest.fixture
def other(model):
    return sparsify(copy.deepcopy(model), Relufication(stage=1))


def windows_of(count: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (count, length))


def probabilities(model, windows: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.from_numpy(windows)).logits
    return logits.double().softmax(-1).numpy()[:, :-1]


def test_perplexity_is_the_hand_computed_one(model) -> None:
    windows = windows_of(5, 9)
    p = probabilities(model, windows)
    losses = [[-math.log(p[w, t, windows[w, t + 1]]) for t in range(8)] for w in range(5)]
    found = perplexity(model, windows, batch_size=2)
    assert found.nats_per_token == pytest.approx(np.mean(losses), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert found.standard_error == pytest.approx(np.mean(losses, 1).std(ddof=1) / math.sqrt(5), rel=1e-4)
    assert found.tokens == 5 * 8


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(model) -> None:
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity(model, windows_of(3, 4)).perplexity == pytest.approx(VOCAB, rel=1e-5)


def test_the_first_token_of_a_window_is_never_predicted(model) -> None:
    windows = windows_of(1, 2)
    p = probabilities(model, windows)[0, 0, windows[0, 1]]
    assert perplexity(model, windows).perplexity == pytest.approx(1 / p, rel=1e-5)


def test_a_model_is_faithful_to_itself(model) -> None:
    found = fidelity(model, copy.deepcopy(model), windows_of(3, 7))
    assert found.kl == 0.0 and found.standard_error == 0.0 and found.per_window == (0.0, 0.0, 0.0)


def test_fidelity_is_the_hand_computed_kl_from_the_dense_model(model, other) -> None:
    windows = windows_of(4, 6)
    p, q = probabilities(model, windows), probabilities(other, windows)
    per_window = (p * np.log(p / q)).sum(-1).mean(1)
    found = fidelity(model, other, windows, batch_size=3)
    assert found.per_window == pytest.approx(tuple(per_window), rel=1e-4)
    assert found.kl == pytest.approx(per_window.mean(), rel=1e-4)
    assert found.standard_error == pytest.approx(per_window.std(ddof=1) / 2, rel=1e-3)
    assert found.tokens == 4 * 5


@pytest.mark.parametrize("batch_size", [1, 2, 3, 17])
def test_the_batch_size_does_not_matter(model, other, batch_size: int) -> None:
    windows = windows_of(7, 5)
    assert fidelity(model, other, windows, batch_size).kl == pytest.approx(
        fidelity(model, other, windows, 7).kl, rel=1e-5
    )


def test_measuring_leaves_the_models_as_they_were(model, other) -> None:
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    fidelity(model, other, windows_of(2, 4))
    assert [module.training for module in model.modules()] == before
    assert not other.training and all(p.grad is None for p in model.parameters())


def test_one_window_has_no_standard_error(model) -> None:
    assert math.isnan(perplexity(model, windows_of(1, 4)).standard_error)


def test_pairing_removes_what_the_windows_share(model, other) -> None:
    windows = windows_of(6, 8)
    first, second = fidelity(model, other, windows), fidelity(model, model, windows)
    assert paired_difference(first, first).mean == paired_difference(first, first).standard_error == 0.0
    difference = paired_difference(first, second)
    assert difference.mean == pytest.approx(first.kl)
    assert difference.standard_error == pytest.approx(first.standard_error)
    with pytest.raises(ValueError, match="6 windows cannot be paired with 2"):
        paired_difference(first, fidelity(model, other, windows[:2]))


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (windows_of(0, 4), "at least one window"),
        (windows_of(2, 1), "at least 2 tokens"),
        (windows_of(2, 4)[0], "expected integers"),
        (windows_of(2, 4).astype(float), "expected integers"),
        (windows_of(2, 4) + VOCAB, "vocabulary of 53"),
        (windows_of(2, 4) - VOCAB, "vocabulary of 53"),
    ],
    ids=["none", "too short", "flat", "floats", "ids too large", "negative ids"],
)
def test_unfit_windows_are_refused(model, windows: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        perplexity(model, windows)


def test_another_vocabulary_is_refused(model) -> None:
    larger = family("llama")
    larger.config.vocab_size = 54
    with pytest.raises(UserError, match="53 tokens, this one 54"):
        fidelity(model, larger, windows_of(2, 4))
