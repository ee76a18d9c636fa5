"""PPL-p% sparsity: models whose answer is known, and what holds for every criterion."""

import numpy as np
import pytest
import torch
from tests.measure.made_traces import windows_of

import families
from relufy.errors import UserError
from relufy.measure.cett import cett_sparsity
from relufy.measure.modes import Scored, window_losses
from relufy.measure.neuron_masks import masked_neurons
from relufy.measure.ppl_sparsity import CRITERIA, ppl_sparsity
from relufy.measure.sparsity import measure_sparsity
from relufy.method import Relufication
from relufy.methods.sparsify import sparsify
from relufy.model.sites import find_sites

WINDOWS = windows_of(6, 16)
ROUGH = {"tolerance": 1 / 32}


def nats(model) -> float:
    return window_losses(model, WINDOWS, Scored("all", WINDOWS.shape[1])).perplexity().nats_per_token


@pytest.mark.parametrize("criterion", CRITERIA)
def test_where_nothing_matters_everything_can_be_left_out(criterion: str) -> None:
    model = families.family("llama")
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    found = ppl_sparsity(model, WINDOWS, 0.0, criterion, **ROUGH)
    assert (found.level, found.mean, found.ratio) == (1.0, 1.0, 1.0)


def test_neurons_that_nothing_reads_can_be_left_out_at_no_loss() -> None:
    """Half of down's columns are zero: those neurons have no norm, so they go at any percentage."""
    model = families.family("llama")
    for block in find_sites(model):
        torch.nn.init.zeros_(block.down.module.weight[:, :20])
    found = ppl_sparsity(model, WINDOWS, 0.0, **ROUGH)
    assert found.mean >= 20 / 43 and found.ratio <= 1


@pytest.mark.parametrize("criterion", ["cett", "universal"])
def test_at_0_percent_a_relu_model_has_at_least_its_zeros(criterion: str) -> None:
    model = sparsify(families.family("llama"), Relufication())
    zeros = measure_sparsity(model, WINDOWS[:, :-1]).sparsity["down"]
    found = ppl_sparsity(model, WINDOWS, 0.0, criterion, **ROUGH)
    assert all(found.sparsity[layer] >= zeros[layer] - 1e-9 for layer in range(2))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_more_loss_allows_more_and_never_more_than_asked(criterion: str) -> None:
    model = families.family("llama")
    found = [ppl_sparsity(model, WINDOWS, percent, criterion, **ROUGH) for percent in (1, 10, 50)]
    assert [f.mean for f in found] == sorted(f.mean for f in found)
    assert found[0].mean < found[-1].mean
    assert all(f.ratio <= 1 + f.percent / 100 for f in found)
    assert found[0].perplexity == pytest.approx(np.exp(nats(model)))


def test_the_ratio_is_that_of_the_model_without_these_neurons() -> None:
    """With the epsilons of equal CETT at the level that was found, put on by hand."""
    model = families.family("llama")
    found = ppl_sparsity(model, WINDOWS, 1.0, tolerance=1 / 64)
    cett = cett_sparsity(model, WINDOWS, target=found.level)
    assert all(error <= found.level for error in cett.error)
    norms = [block.down.module.weight.detach().norm(dim=0) for block in find_sites(model)]

    def mask(layer: int, values: torch.Tensor) -> torch.Tensor:
        return torch.where(values.abs() * norms[layer] < cett.epsilon[layer], 0, values)

    with masked_neurons(model, "down", mask):
        pruned = nats(model)
    assert np.exp(pruned - nats(model)) == pytest.approx(found.ratio, rel=0.01)
    assert found.sparsity == pytest.approx(cett.sparsity, abs=0.05)


def test_top_k_leaves_out_as_many_in_each_layer() -> None:
    found = ppl_sparsity(families.family("llama"), WINDOWS, 20.0, "topk", **ROUGH)
    assert found.sparsity[0] == found.sparsity[1] == pytest.approx(1 - round((1 - found.level) * 43) / 43)


def test_batches_change_nothing() -> None:
    model = families.family("llama")
    found = [ppl_sparsity(model, WINDOWS, 10.0, batch_size=size, **ROUGH) for size in (1, 6)]
    assert found[0].level == found[1].level
    assert found[0].sparsity == pytest.approx(found[1].sparsity, abs=1e-3)


def test_what_cannot_be_asked() -> None:
    model = families.family("llama")
    with pytest.raises(UserError, match="0 % or more, found -1"):
        ppl_sparsity(model, WINDOWS, -1)
    with pytest.raises(UserError, match=r"no criterion 'cet'.*cett, universal, fat, topk"):
        ppl_sparsity(model, WINDOWS, criterion="cet")
