"""R-Sparse: exact at full rank, dense without sparsity, within its budget, never worse than thresholds."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.methods.calibrated import IDS, calibrated, realised, saved_and_loaded, text

import families
from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.errors import UserError
from relufy.measure.quality import perplexity
from relufy.method import RSparse, Teal
from relufy.methods.evolution import evolve
from relufy.methods.inputs import weight_of
from relufy.methods.rsparse import budget, low_rank
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
            inner, outer = low_rank(weight_of(projection), min(projection.shape))
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


def test_the_search_is_seeded() -> None:
    first, second = (calibrated("llama", SEARCHED) for _ in range(2))
    assert sparsity_of(first).sparsifiers == sparsity_of(second).sparsifiers
    assert torch.equal(first(IDS).logits, second(IDS).logits)


def test_evolution_goes_downhill_within_bounds() -> None:
    start, seen = dict.fromkeys("abcde", 1.0), []

    def loss(numbers):
        seen.append(numbers)
        return sum((value - 0.3) ** 2 for value in numbers.values())

    found, least = evolve([(loss(start), start)], loss, 8, 60, 0, lambda done, total: None)
    assert least == loss(found) < loss(start) / 2
    assert all(0 <= value <= 1 for numbers in seen for value in numbers.values())


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
