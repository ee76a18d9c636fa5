"""The loss terms against their definitions."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from families import family
from relufy.method import Relufication
from relufy.methods.sparsify import sparsify
from relufy.recipe import Finetune
from relufy.train.losses import hidden_mismatch, loss_terms


@pytest.fixture
def teacher():
    return family("llama")


@pytest.fixture
def model(teacher):
    return sparsify(copy.deepcopy(teacher), Relufication(stage=2))


def some_ids(count: int = 3, length: int = 7) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 53, (count, length)))


def test_cross_entropy_is_hugging_face_s(model) -> None:
    ids = some_ids()
    terms = loss_terms(Finetune(distill=0.0), model, None, ids)
    assert set(terms) == {"loss", "cross_entropy"}
    assert terms["loss"].item() == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)


def test_distillation_is_the_kl_over_all_predicted_positions(model, teacher) -> None:
    ids = some_ids()
    terms = loss_terms(Finetune(distill=1.0), model, teacher, ids)
    p, q = (m(ids).logits[:, :-1].softmax(-1) for m in (teacher, model))
    assert set(terms) == {"loss", "kl"}
    assert terms["loss"].item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)


def test_the_mixture_is_weighted(model, teacher) -> None:
    terms = loss_terms(Finetune(distill=0.25, match_hidden=3.0), model, teacher, some_ids())
    expected = 0.25 * terms["kl"] + 0.75 * terms["cross_entropy"] + 3.0 * terms["mismatch"]
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_gradient_of_the_kl_at_the_dense_model_itself_is_zero(teacher) -> None:
    model = copy.deepcopy(teacher)
    loss_terms(Finetune(distill=1.0, match_hidden=1.0), model, teacher, some_ids())["loss"].backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert norm < 1e-5
    assert all(p.grad is None for p in teacher.parameters())


def test_hidden_mismatch_is_relative_to_each_token() -> None:
    dense = (torch.tensor([[[3.0, 4.0], [300.0, 400.0]]]), torch.ones(1, 2, 2))
    found = (dense[0] * 1.5, dense[1])
    assert hidden_mismatch(dense, found).item() == pytest.approx(0.25 / 2)
    assert hidden_mismatch(dense, dense).item() == 0.0


def test_kl_does_not_depend_on_the_logits_offset(model, teacher) -> None:
    from relufy.measure.quality import kl_divergence

    logits = torch.randn(2, 3, 11)
    assert kl_divergence(logits, logits + 100.0).abs().max() < 1e-4
    expected = F.kl_div(F.log_softmax(-logits, -1), F.softmax(logits, -1), reduction="none").sum(-1)
    assert torch.allclose(kl_divergence(logits, -logits), expected, atol=1e-5)
