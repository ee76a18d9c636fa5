"""WINA: the score is |x| times the column's norm, of every kind of projection; equal norms are magnitudes."""

from pathlib import Path

import pytest
import torch
from tests.methods.calibrated import IDS, calibrated, realised, saved_and_loaded, text
from tests.methods.written import bundled_model, found_by, written_windows
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import families
from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.measure.quality import fidelity
from relufy.method import Teal, Wina
from relufy.methods.inputs import column_norms
from relufy.methods.sparsify import sparsify
from relufy.model.configuration import sparsity_of
from relufy.model.sites import find_sites
from relufy.model.sparsifiers import apply_sparsity

UNIFORM = Wina(allocation="uniform")
TOPK = Wina(allocation="uniform", select="topk")


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "falcon", "bloom"])
def test_norms_are_of_what_an_input_adds_to_the_output(name: str) -> None:
    for projection in find_sites(families.family(name))[0].projections().values():
        unit = torch.eye(projection.shape[1])
        bias = projection.module(torch.zeros(1, projection.shape[1]))
        torch.testing.assert_close(column_norms(projection), (projection.module(unit) - bias).norm(dim=1))


def test_equal_norms_are_magnitude_top_k_bit_for_bit() -> None:
    model, plain = families.family("llama"), families.family("llama")
    with torch.no_grad():
        for each in (model, plain):
            for block in find_sites(each):
                for projection in block.projections().values():
                    projection.module.weight.copy_(0.25 * projection.module.weight.sign())
    sparsify(model, TOPK, text())
    masks = [
        Sparsifier((site,), "topk", k=round(0.5 * p.shape[1]), layers=(block.index,))
        for block in find_sites(plain)
        for site, p in block.projections().items()
    ]
    apply_sparsity(plain, ActivationSparsity(tuple(masks)))
    assert torch.equal(model(IDS).logits, plain(IDS).logits)


def test_other_norms_are_another_choice() -> None:
    model = families.family("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, :10] *= 100
    sparsify(model, TOPK, text())
    mask = model.model.layers[0].mlp.down_proj.sparsifier
    assert mask.keeps(torch.ones(1, 43))[0, :10].all()


@pytest.mark.parametrize("method", [UNIFORM, TOPK, Wina(sparsity=0.4)], ids=["uniform", "topk", "greedy"])
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "olmo2"])
def test_held_out_sparsity_is_what_was_asked_for(name: str, method: Wina) -> None:
    model = calibrated(name, method)
    assert abs(realised(model, text(seed=1)) - method.sparsity) < 0.02


def test_a_down_that_reads_zeros_already_is_left_alone() -> None:
    sites = {
        site
        for s in sparsity_of(calibrated("opt", UNIFORM)).sparsifiers
        if s.is_selection
        for site in s.sites
    }
    assert sites == {"q", "k", "v", "o", "up"}


def test_an_input_with_enough_zeros_of_its_own_gets_no_mask() -> None:
    relufied = sparsify(families.family("llama"), "relufy-stage1")
    found = found_by(Wina(sparsity=0.3, allocation="uniform"), relufied, text())
    assert {site for s in found.sparsifiers for site in s.sites} == {"q", "k", "v", "o", "gate", "up"}
    assert not any(key[1] == "down" for key in found.tensors)


def weighing_alike(name: str) -> PreTrainedModel:
    """Return a model whose projections have columns of norm 1, exactly: four entries of 0.5 or -0.5 each."""
    model, generator = families.family(name), torch.Generator().manual_seed(3)
    for block in find_sites(model):
        for projection in block.projections().values():
            rows = torch.rand(projection.shape, generator=generator).argsort(0)
            halves = torch.randint(0, 2, projection.shape, generator=generator) - 0.5
            whole, module = halves * (rows < 4), projection.module
            module.weight.data.copy_(whole.T if isinstance(module, Conv1D) else whole)
            assert column_norms(projection).unique().tolist() == [1.0]
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_norms_of_1_have_the_thresholds_of_teal(name: str) -> None:
    thresholds = []
    for method in (UNIFORM, Teal(allocation="uniform")):
        found = found_by(method, weighing_alike(name), text())
        thresholds.append({(site, s.layers): s.threshold for s in found.sparsifiers for site in s.sites})
    assert thresholds[0] == thresholds[1]
    assert len(thresholds[0]) >= 12


@pytest.mark.parametrize("method", [UNIFORM, TOPK], ids=["threshold", "topk"])
def test_light_columns_are_left_out_before_small_inputs(method: Wina) -> None:
    def uneven() -> PreTrainedModel:
        model = families.family("llama")
        for block in find_sites(model):
            for projection in block.projections().values():
                projection.module.weight.data[:, ::2] *= 0.02
        return model

    wina = sparsify(uneven(), method, text())
    teal = sparsify(uneven(), Teal(allocation="uniform"), text())
    assert fidelity(uneven(), wina, text()).kl < fidelity(uneven(), teal, text()).kl / 5


@pytest.mark.parametrize("method", [UNIFORM, TOPK], ids=["threshold", "topk"])
def test_real_text_that_was_held_out_is_as_sparse_as_asked_for(method: Wina) -> None:
    calibration, held_out = written_windows()
    assert realised(sparsify(bundled_model(), method, calibration), held_out) == pytest.approx(0.5, abs=0.02)


def test_almost_no_sparsity_by_top_k_is_dense_bit_for_bit() -> None:
    model = calibrated("llama", Wina(sparsity=1e-6, allocation="uniform", select="topk"))
    assert torch.equal(model(IDS).logits, families.family("llama")(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_saved_and_loaded_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = calibrated(name, UNIFORM, dtype)
    loaded = saved_and_loaded(model, tmp_path / "saved", dtype)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert sparsity_of(loaded).provenance["derived_from"] == sparsity_of(model).provenance["derived_from"]
