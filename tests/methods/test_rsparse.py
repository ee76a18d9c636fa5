"""R-Sparse: exact at full rank and at next to no sparsity, budgets that add up, a search that only gains."""

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.engine.contract import all_at_once, assert_close, bits, hf_logits, in_steps, tokens_of
from tests.methods.written import bundled_model, drawn_windows, found_by, written_windows
from transformers import LlamaConfig, PreTrainedModel

import families
import relufy
from relufy.activation_sparsity import LOW_RANK, ActivationSparsity, Sparsifier
from relufy.engine.naive import NaiveDecoder
from relufy.errors import UserError
from relufy.measure.quality import perplexity
from relufy.measure.sparsity import measure_sparsity
from relufy.method import RSparse, Teal
from relufy.methods.inputs import parameters, weight_of
from relufy.methods.rsparse import budget, low_rank
from relufy.methods.setting import Found
from relufy.methods.sparsify import sparsify
from relufy.model.checkpoint import save_checkpoint
from relufy.model.configuration import sparsity_of
from relufy.model.sites import find_sites
from relufy.model.sparsifiers import apply_sparsity

torch.set_num_threads(1)

IDS = torch.tensor([[3, 4, 5, 50, 7], [0, 1, 2, 9, 9]])
GQA = LlamaConfig(**(families.OWN_HEAD_DIM | {"hidden_size": 40, "num_attention_heads": 10}), head_dim=4)
"""k and v have 4 rows, q has 40."""


def branches(found: Found) -> dict[tuple[int, str], tuple[int, int, int]]:
    """Return (out, rank, in) of each low-rank branch, by layer and site."""
    inner = {key[:2]: tensor.shape for key, tensor in found.tensors.items() if key[2] == "low_rank_in"}
    outer = {key[:2]: tensor.shape for key, tensor in found.tensors.items() if key[2] == "low_rank_out"}
    assert all(inner[key][0] == outer[key][1] for key in inner)
    return {key: (outer[key][0], *inner[key]) for key in inner}


def with_ranks(name: str, rank: int, threshold: float) -> PreTrainedModel:
    """Return a model with thresholds at every input, and branches of one rank for what they leave out."""
    model, sparsifiers, tensors = families.family(name), [], {}
    for block in find_sites(model):
        for group in block.groups():
            projection = block.projections()[group[0]]
            mask = {"threshold": threshold, "correction": LOW_RANK, "layers": (block.index,)}
            sparsifiers.append(Sparsifier(group, "threshold", **mask))
            inner, outer = low_rank(weight_of(projection), min(rank, *projection.shape))
            tensors[f"{projection.name}.sparsifier.low_rank_in"] = inner
            tensors[f"{projection.name}.sparsifier.low_rank_out"] = outer
    return apply_sparsity(model, ActivationSparsity(tuple(sparsifiers)), tensors)


@pytest.mark.parametrize("threshold", [0.1, 0.7, 1e9])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "falcon", "olmo2"])
def test_full_rank_is_dense_for_any_threshold(name: str, threshold: float) -> None:
    expected = families.family(name)(IDS).logits
    found = with_ranks(name, 99, threshold)(IDS).logits
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert (with_ranks(name, 2, 0.7)(IDS).logits - expected).norm() > 1e-2 * expected.norm()


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_a_target_of_next_to_nothing_is_dense_bit_for_bit(name: str) -> None:
    windows = torch.from_numpy(drawn_windows())
    model = sparsify(families.family(name), RSparse(sparsity=1e-9, search=False), windows.numpy())
    assert torch.equal(model(windows).logits, families.family(name)(windows).logits)


def test_the_error_falls_with_the_rank_at_a_fixed_threshold() -> None:
    weight = torch.randn(17, 29, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4000, 29, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dropped = torch.where(x.abs() < 0.8, x, 0)
    errors = []
    for rank in range(18):
        inner, outer = low_rank(weight, rank)
        errors.append(float((dropped @ weight.T - dropped @ inner.double().T @ outer.double().T).norm()))
    assert all(more > less for more, less in pairwise(errors))
    assert errors[-1] < 1e-5 * errors[0]


def test_a_model_errs_less_with_more_rank() -> None:
    expected = families.family("llama")(IDS).logits
    errors = [(with_ranks("llama", rank, 0.7)(IDS).logits - expected).norm().item() for rank in (1, 12, 22)]
    assert errors[0] > errors[1] > errors[2]


@given(st.integers(1, 9000), st.integers(1, 9000), st.floats(0.01, 0.99), st.floats(0, 1))
def test_the_budget_is_the_papers_and_is_kept(
    outputs: int, inputs: int, sparsity: float, channels: float
) -> None:
    found = budget(outputs, inputs, sparsity, channels)
    allowed = (1 - sparsity) * inputs * outputs
    rank = int((1 - sparsity) * (1 - channels) * inputs * outputs / (inputs + outputs))
    alpha = channels if rank > 1 else 1.0
    assert found.rank == (rank if rank > 1 else 0)
    assert found.channels == int(inputs * (1 - sparsity) * alpha)
    assert found.sparsity == pytest.approx(1 - (1 - sparsity) * alpha)
    assert found.weights(outputs, inputs) <= allowed * (1 + 1e-9)
    assert found.weights(outputs, inputs) > allowed - outputs - 2 * (inputs + outputs)


def test_ranks_and_channels_of_a_llama_3_8b() -> None:
    assert (budget(4096, 4096, 0.5, 0.5).channels, budget(4096, 4096, 0.5, 0.5).rank) == (1024, 512)
    k = budget(1024, 4096, 0.5, 0.2)
    assert (k.channels, k.rank, k.sparsity) == (409, 327, 0.9)
    assert budget(1024, 4096, 0.5, 1.0).rank == 0


def test_grouped_queries_have_ranks_of_their_own_shapes() -> None:
    windows = drawn_windows()
    found = found_by(RSparse(sparsity=0.4, channels=0.3, search=False), families.build(GQA), windows)
    assert branches(found)[0, "q"] == (40, int(0.6 * 0.7 * 40 * 40 / 80), 40) == (40, 8, 40)
    assert (0, "k") not in branches(found)  # int(0.6 * 0.7 * 4 * 40 / 44) is 1: not worth its weights
    k = next(s for s in found.sparsifiers if "k" in s.sites)
    assert not k.correction and not k.per_channel


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "falcon"])
def test_what_is_read_is_the_budget(name: str) -> None:
    """Columns of inputs that pass, and both factors of the branch, on other text."""
    windows, model = drawn_windows(), families.family(name)
    found = found_by(RSparse(sparsity=0.5, channels=0.5, search=False), families.family(name), windows)
    sparsify(model, RSparse(sparsity=0.5, channels=0.5, search=False), windows)
    realised, ranks = measure_sparsity(model, drawn_windows(seed=1)).sparsity, branches(found)
    for block in find_sites(families.family(name)):
        for group in block.groups():
            outputs, inputs = block.projections()[group[0]].shape
            rank = ranks[block.index, group[0]][1] if (block.index, group[0]) in ranks else 0
            columns = (1 - realised[group[0]][block.index]) * inputs * outputs
            assert columns + rank * (inputs + outputs) <= 0.5 * inputs * outputs * 1.06, (block.index, group)
    assert ranks


def test_channels_alone_are_the_thresholds_of_teal() -> None:
    windows = drawn_windows()
    found = found_by(RSparse(search=False), families.family("llama"), windows)
    teal = found_by(Teal(allocation="uniform"), families.family("llama"), windows)
    assert set(found.sparsifiers) == set(teal.sparsifiers)
    assert not found.tensors


def planted(weak: float = 1e-3) -> PreTrainedModel:
    """Return a model whose gate, up and q have rank 2, nearly: a branch can stand in for all of them."""
    model, generator = families.family("llama"), torch.Generator().manual_seed(0)
    for block in find_sites(model):
        for projection in (block.q, block.gate, block.up):
            weight: torch.Tensor = projection.module.weight  # type: ignore[assignment,union-attr]
            rows, columns = weight.shape
            thin = torch.randn(rows, 2, generator=generator) @ torch.randn(2, columns, generator=generator)
            weight.data.copy_(0.2 * thin + weak * torch.randn(rows, columns, generator=generator))
    return model


SEARCH = RSparse(sparsity=0.6, channels=0.6, population=5, generations=3, windows=6)


@pytest.mark.parametrize("start", [1.0, 0.6])
def test_the_search_is_never_worse_on_its_text_and_its_loss_is_the_models(start: float) -> None:
    windows, method = drawn_windows(), replace(SEARCH, channels=start)
    found = found_by(method, planted(), windows)
    after, before = map(float, re.findall(r"\d+\.\d+", found.notes[-1]))
    assert after < before if start < 1 else after <= before
    assert int(found.notes[-1].split()[0]) == len(branches(found))
    assert branches(found) or start == 1
    own = windows[np.linspace(0, len(windows) - 1, method.windows, dtype=np.int64)]
    for tried, expected in ((method, after), (replace(method, search=False, channels=1.0), before)):
        model = sparsify(planted(), tried, windows)
        assert perplexity(model, own, 8).nats_per_token == pytest.approx(expected, abs=1e-4)


def test_an_input_with_enough_zeros_of_its_own_gets_no_branch() -> None:
    relufied = sparsify(families.family("llama"), "relufy-stage1")
    found = found_by(RSparse(sparsity=0.2, channels=0.7, search=False), relufied, drawn_windows())
    assert {site for _, site in branches(found)} == {"q", "o", "gate", "up"}
    assert "down" not in {site for s in found.sparsifiers for site in s.sites}


def test_the_search_is_repeatable_and_follows_its_seed() -> None:
    windows = drawn_windows()
    one, two = (found_by(SEARCH, planted(), windows) for _ in range(2))
    assert one.sparsifiers == two.sparsifiers and one.notes == two.notes
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(one.tensors[key], two.tensors[key]) for key in one.tensors)


def test_held_out_text_is_as_sparse_as_asked_for() -> None:
    calibration, held_out = written_windows()
    model = sparsify(bundled_model(), RSparse(channels=0.7, search=False), calibration)
    found = measure_sparsity(model, held_out).sparsity
    blocks = find_sites(bundled_model())
    skipped = sum(found[g[0]][b.index] * parameters(b, g) for b in blocks for g in b.groups())
    assert skipped / sum(parameters(b, g) for b in blocks for g in b.groups()) == pytest.approx(
        0.65, abs=0.02
    )
    assert all(s.correction == LOW_RANK for s in sparsity_of(model).sparsifiers)
    assert len(sparsity_of(model).sparsifiers) == 7 * len(blocks)


@pytest.mark.parametrize("dtype", ["f32", "int8"])
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_the_engine_agrees(name: str, dtype: str, tmp_path: Path) -> None:
    model = sparsify(families.family(name), RSparse(channels=0.5, search=False), drawn_windows())
    assert any(s.correction for s in sparsity_of(model).sparsifiers)
    folder = save_checkpoint(model, None, tmp_path / "model")
    packed = relufy.pack(folder, tmp_path / "model.relufy", dtype)
    engine, naive, compared = relufy.Engine(packed, threads=2, kv_dtype="f32"), NaiveDecoder(packed), 0
    for text in [tokens_of(53, 4, seed) for seed in range(6)]:
        found, expected = in_steps(engine, text, 1), naive.run(text)
        assert bits(all_at_once(engine, text)) == bits(found)
        cut, bound = (1e-5, 1e-4) if dtype == "f32" else (3e-4, 2e-4)
        compared += assert_close(found, expected.logits, expected.margins, cut, bound)
        if dtype == "f32":
            compared += assert_close(found, hf_logits(folder, text), expected.margins)
    assert compared > 12


@pytest.mark.parametrize("change", [{"channels": 1.1}, {"channels": -0.1}, {"population": 0}, {"windows": 0}])
def test_values_that_make_no_sense_are_refused(change: Mapping[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        RSparse(**change)  # type: ignore[arg-type]
