"""Predictivity: a gate of low rank is found, masks keep as many neurons, and order as they should."""

import numpy as np
import pytest
import torch
from tests.measure.made_traces import windows_of

import families
from relufy.errors import UserError
from relufy.measure.prediction.training import Training
from relufy.measure.predictivity import MASKS, PREDICTORS, predictivity
from relufy.method import Relufication
from relufy.methods.sparsify import sparsify
from relufy.model.sites import find_sites

WINDOWS = windows_of(20, 24)
QUICK = Training(rounds=2)


def relufied(rank: int | None = None):
    """Return a relufied model; with a rank, each gate is the product of two matrices of it."""
    model = sparsify(families.family("llama"), Relufication())
    if rank is not None:
        generator = torch.Generator().manual_seed(0)
        for block in find_sites(model):
            rows, columns = block.gate.module.weight.shape
            factors = (torch.randn(n, rank, generator=generator) for n in (rows, columns))
            outer, inner = factors
            block.gate.module.weight.data = 0.3 * outer @ inner.T
    return model


def test_a_gate_of_the_predictors_rank_is_predicted() -> None:
    """Scores are then exact up to the order among neurons of different tokens, so recall is high."""
    found = predictivity(relufied(4), WINDOWS, rank=6, multiples=(1.0, 2.0), training=QUICK)
    rough = predictivity(relufied(), WINDOWS, rank=2, multiples=(1.0, 2.0), training=QUICK)
    for one, other in zip(found.predictors, rough.predictors, strict=True):
        if one.kind == "svd":
            assert one.recall > (0.85 if one.multiple == 1 else 0.99)
            assert one.recall >= other.recall


def test_each_mask_keeps_as_many_and_the_oracle_costs_least() -> None:
    found = predictivity(relufied(), WINDOWS, rank=16, multiples=(1.0, 3.0), training=QUICK)
    assert found.layers == (0, 1) and len(found.predictors) == 2 * 2 * len(PREDICTORS)
    for multiple in (1.0, 3.0):
        masks = {one.mask: one for one in found.masks if one.multiple == multiple}
        assert list(masks) == list(MASKS)
        assert len({one.kept_share for one in masks.values()}) == 1
        cost = {mask: abs(one.difference.mean) for mask, one in masks.items()}
        assert cost["oracle"] <= cost["random"]
    everything = [one for one in found.masks if one.multiple == 3.0]
    assert all(
        one.kept_share == 1 and one.difference.mean == pytest.approx(0, abs=1e-6) for one in everything
    )


def test_recall_and_precision_count_the_same_hits() -> None:
    found = predictivity(relufied(), WINDOWS, layers=[1], rank=8, multiples=(0.5,), training=QUICK)
    for one in found.predictors:
        assert one.layer == 1 and one.kept_share == pytest.approx(0.5 * found.active_share[0], abs=1 / 43)
        assert one.recall == pytest.approx(one.precision * one.kept_share / found.active_share[0], rel=0.15)


def test_as_plain_data() -> None:
    plain = predictivity(relufied(), WINDOWS, [0], 4, (1.0,), QUICK).to_json()
    assert "per_window" not in plain["masks"][0]["perplexity"] and plain["predictors"][0]["kind"] == "svd"


def test_what_cannot_be_asked() -> None:
    with pytest.raises(UserError, match="5 windows or more, found 4"):
        predictivity(relufied(), WINDOWS[:4])
    with pytest.raises(UserError, match=r"\[0, 1\], found \[5\]"):
        predictivity(relufied(), WINDOWS, layers=[5])
    with pytest.raises(UserError, match="no layer has zeros"):
        predictivity(families.family("llama"), np.asarray(WINDOWS))
