"""Which tokens are sparsified and scored: all, the second half, or what is decoded behind a prompt."""

import math

import numpy as np
import pytest
import torch

import families
from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.errors import UserError
from relufy.measure.modes import MODES, Scored, window_losses
from relufy.measure.quality import perplexity
from relufy.model.sparsifiers import apply_sparsity

WINDOWS = np.random.default_rng(1).integers(3, 53, (5, 17))
SITES = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


def masked(**changes):
    masks = tuple(Sparsifier(sites, "threshold", threshold=0.6, **changes) for sites in SITES)
    return apply_sparsity(families.family("llama"), ActivationSparsity(masks))


def test_all_tokens_are_what_perplexity_scores() -> None:
    model = families.family("llama")
    found, expected = window_losses(model, WINDOWS, Scored("all", 17), 2), perplexity(model, WINDOWS)
    assert found.tokens == expected.tokens
    assert found.perplexity().nats_per_token == pytest.approx(expected.nats_per_token, rel=1e-6)
    assert found.perplexity().standard_error == pytest.approx(expected.standard_error, rel=1e-4)


def test_the_second_half_is_scored_behind_a_dense_first_one() -> None:
    model = masked(dense_first_tokens=8)
    found = window_losses(model, WINDOWS, Scored("second-half", 17))
    assert found.tokens == 5 * 8
    with torch.inference_mode():
        logits = model(torch.from_numpy(WINDOWS)).logits[:, 8:-1].log_softmax(-1)
    expected = -logits.gather(-1, torch.from_numpy(WINDOWS[:, 9:, None])).mean((1, 2))
    assert found.per_window == pytest.approx(expected.tolist(), rel=1e-5)


def test_decoding_gives_the_losses_of_the_second_half() -> None:
    decoded = window_losses(masked(phase="decode"), WINDOWS, Scored("decode", 17), 3)
    at_once = window_losses(masked(dense_first_tokens=8), WINDOWS, Scored("second-half", 17), 3)
    assert decoded.tokens == at_once.tokens
    assert decoded.per_window == pytest.approx(at_once.per_window, rel=1e-5)
    dense = window_losses(families.family("llama"), WINDOWS, Scored("decode", 17), 3)
    assert abs(decoded.minus(dense).mean) > 1e-3


def test_a_difference_is_paired_by_window() -> None:
    model, other = families.family("llama"), masked()
    first, second = (window_losses(m, WINDOWS, Scored("all", 17)) for m in (model, other))
    difference = second.minus(first)
    apart = np.array(second.per_window) - np.array(first.per_window)
    assert difference.mean == pytest.approx(apart.mean())
    assert difference.standard_error == pytest.approx(apart.std(ddof=1) / math.sqrt(5))


@pytest.mark.parametrize("mode", MODES)
def test_tensors_are_split_into_what_counts_and_what_does_not(mode: str) -> None:
    scored = Scored(mode, 12)
    scored.begin(2, 0, 11)
    values = torch.arange(2 * 11 * 3).reshape(22, 3)
    dense, counted = scored.split(values, 1)
    first = 0 if mode == "all" else 6
    assert dense.shape == (2, first, 3) and counted.shape == (2, 11 - first, 3)
    assert torch.equal(torch.cat([dense, counted], 1).reshape(22, 3), values)
    scored.begin(2, 9, 1)
    assert scored.split(values[:2], 1)[1].shape == (2, 1, 3)


def test_an_unknown_mode_is_named_with_a_suggestion() -> None:
    with pytest.raises(UserError, match="did you mean 'decode'"):
        Scored("decoding", 16)
