"""R-Sparse: exact at full rank, dense without sparsity, within its budget, never worse than thresholds."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.methods.calibrated import IDS, calibrated, realised, saved_and_loaded, text
from tests.methods.written import bundled_model, found_by, written_windows
from transformers import PreTrainedModel

import families
from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.errors import UserError
from relufy.measure.quality import perplexity
from relufy.method import RSparse, Teal
from relufy.methods.rsparse import budget, low_rank
from relufy.methods.setting import Found
from relufy.methods.sparsify import sparsify
from relufy.model.configuration import sparsity_of
from relufy.model.sites import find_sites
from relufy.model.sparsifiers import apply_sparsity, sparsity_tensors

BRANCHES = RSparse(search=False, channels=0.5, sparsity=0.4)
SEARCHED = RSparse(population=4, generations=2, windows=4)


@pytest.mark.parametrize("threshold", [0.1, 1.0, 1e9])
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_full_rank_is_dense_for_any_threshold(name: str, threshold: float) -> None:
    model = families.family(name)
    expected, blocks = model(IDS).logits, find_sites(model)
    masks = [
        Sparsifier(group, "threshold", threshold=threshold, correction="low_rank")
        for group in blocks[0].groups()
    ]
    sparsity, tensors = ActivationSparsity(tuple(masks)), {}
    for block in blocks:
        for projection in block.projections().values():
            inner, outer = low_rank(projection.matrix().double(), min(projection.shape))
            tensors[f"{projection.name}.sparsifier.low_rank_in"] = inner
            tensors[f"{projection.name}.sparsifier.low_rank_out"] = outer
    assert set(tensors) == set(sparsity_tensors(blocks, sparsity))
    apply_sparsity(model, sparsity, tensors)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-3, atol=1e-4)


def test_no_sparsity_and_channels_alone_are_dense_bit_for_bit() -> None:
    model = calibrated("llama", RSparse(sparsity=1e-9, search=False))
    assert torch.equal(model(IDS).logits, families.family("llama")(IDS).logits)


def test_the_error_falls_with_the_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(30, 20, generator=generator, dtype=torch.float64)
    dropped = torch.randn(50, 20, generator=generator)
    errors = []
    for rank in range(1, 21):
        inner, outer = low_rank(weight, rank)
        errors.append(float((dropped @ weight.float().T - dropped @ inner.T @ outer.T).norm()))
    assert sorted(errors, reverse=True) == errors and len(set(errors)) == 20
    assert errors[-1] < 1e-3


@given(
    st.integers(1, 5000), st.integers(1, 5000), st.floats(0.01, 0.99), st.floats(0, 1, allow_subnormal=False)
)
def test_what_is_read_stays_within_the_budget(
    outputs: int, inputs: int, sparsity: float, channels: float
) -> None:
    spent = budget(outputs, inputs, sparsity, channels)
    assert spent.weights(outputs, inputs) <= (1 - sparsity) * inputs * outputs * (1 + 1e-9)
    assert spent.rank != 1


def test_ranks_are_of_the_true_shapes_of_grouped_queries() -> None:
    """k of Llama-3-8B is 1024 x 4096, half of the budget to the branch: 0.25 * 4096 * 1024 / 5120 = 204."""
    assert budget(1024, 4096, 0.5, 0.5).rank == 204
    assert budget(4096, 4096, 0.5, 0.5).rank == 512
    model = calibrated("llama", BRANCHES)
    for block in find_sites(model):
        for site, projection in block.projections().items():
            spent = budget(*projection.shape, BRANCHES.sparsity, BRANCHES.channels)
            ranks = [len(t) for n, t in projection.module.named_buffers() if n.endswith("low_rank_in")]
            assert ranks == ([spent.rank] if spent.rank else []), site


def test_a_branch_of_rank_one_is_dropped_and_its_budget_goes_to_channels() -> None:
    assert budget(8, 24, 0.5, 0.9) == budget(8, 24, 0.5, 1.0)
    assert budget(8, 24, 0.5, 0.9).sparsity == 0.5


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt", "olmo2"])
def test_held_out_sparsity_is_what_the_channels_leave(name: str) -> None:
    model = calibrated(name, RSparse(search=False))
    masked = {site for s in sparsity_of(model).sparsifiers for site in s.sites}
    assert abs(realised(model, text(seed=1), list(masked)) - 0.5) < 0.02
    with_branches = calibrated(name, BRANCHES)
    for block in find_sites(with_branches):
        spent = budget(*block.up.shape, BRANCHES.sparsity, BRANCHES.channels)
        found = realised(with_branches, text(seed=1), ["up"])
        assert abs(found - spent.sparsity) < 0.02


def test_channels_alone_are_teal_with_the_same_share_everywhere() -> None:
    found = calibrated("llama", RSparse(search=False))
    assert torch.equal(found(IDS).logits, calibrated("llama", Teal(allocation="uniform"))(IDS).logits)


def test_the_search_never_ends_worse_than_thresholds_on_its_text() -> None:
    windows = text(count=12)
    found, plain = (
        sparsify(families.family("llama"), method, windows)
        for method in (
            RSparse(population=4, generations=3, windows=12, sparsity=0.4),
            RSparse(search=False, sparsity=0.4),
        )
    )
    losses = [perplexity(model, windows, 8).nats_per_token for model in (found, plain)]
    assert losses[0] <= losses[1] + 1e-6


def branches(found: Found) -> set[tuple[int, str]]:
    return {(layer, site) for layer, site, name in found.tensors if name == "low_rank_in"}


def planted() -> PreTrainedModel:
    """Return a model whose q, gate and up have rank 2, nearly: a branch can stand in for all of them."""
    model, generator = families.family("llama"), torch.Generator().manual_seed(0)
    for block in find_sites(model):
        for projection in (block.q, block.gate, block.up):
            weight = projection.module.weight  # type: ignore[union-attr]
            rows, columns = weight.shape
            thin = torch.randn(rows, 2, generator=generator) @ torch.randn(2, columns, generator=generator)
            weight.data.copy_(0.2 * thin + 1e-3 * torch.randn(rows, columns, generator=generator))
    return model


def test_what_the_search_says_is_the_loss_of_the_model() -> None:
    torch.manual_seed(0)  # text that the model writes itself, so that to err less is to predict it better
    options = {"do_sample": True, "min_new_tokens": 40, "max_new_tokens": 40, "pad_token_id": 0}
    windows = planted().generate(torch.zeros(24, 1, dtype=torch.int64), **options).numpy()
    method = RSparse(sparsity=0.6, channels=0.6, population=5, generations=3, windows=6)
    found = found_by(method, planted(), windows)
    after, before = map(float, re.findall(r"\d+\.\d+", found.notes[-1]))
    assert after < before
    assert int(found.notes[-1].split()[0]) == len(branches(found)) > 0
    searched_on = windows[np.linspace(0, 23, 6, dtype=np.int64)]
    for each, loss in ((method, after), (RSparse(sparsity=0.6, search=False), before)):
        model = sparsify(planted(), each, windows)
        assert perplexity(model, searched_on, 8).nats_per_token == pytest.approx(loss, abs=1e-4)


def test_an_input_with_enough_zeros_of_its_own_gets_no_branch() -> None:
    relufied = sparsify(families.family("llama"), "relufy-stage1")
    found = found_by(RSparse(sparsity=0.2, channels=0.7, search=False), relufied, text())
    assert {site for _, site in branches(found)} == {"q", "o", "gate", "up"}
    assert "down" not in {site for s in found.sparsifiers for site in s.sites}


def test_real_text_that_was_held_out_is_as_sparse_as_asked_for() -> None:
    calibration, held_out = written_windows()
    model = sparsify(bundled_model(), RSparse(channels=0.7, search=False), calibration)
    assert all(s.correction for s in sparsity_of(model).sparsifiers)
    assert realised(model, held_out) == pytest.approx(0.65, abs=0.02)


def test_the_search_is_seeded() -> None:
    first, second = (calibrated("llama", SEARCHED) for _ in range(2))
    assert sparsity_of(first).sparsifiers == sparsity_of(second).sparsifiers
    assert torch.equal(first(IDS).logits, second(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_saved_and_loaded_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = calibrated(name, BRANCHES, dtype)
    loaded = saved_and_loaded(model, tmp_path / "saved", dtype)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"channels": 1.5}, "channels must lie"), ({"population": 0}, "population must be at least 1")],
)
def test_refused_parameters(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RSparse(**changes)
