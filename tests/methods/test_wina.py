"""WINA: plain magnitudes where all columns weigh the same, elsewhere the right norms; shares as asked for."""

import pytest
import torch
from tests.methods.written import bundled_model, drawn_windows, found_by, written_windows
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import families
from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.errors import UserError
from relufy.measure.quality import fidelity
from relufy.measure.sparsity import measure_sparsity
from relufy.method import Teal, Wina
from relufy.methods.inputs import column_norms, parameters
from relufy.methods.sparsify import sparsify
from relufy.model.configuration import sparsity_of
from relufy.model.sites import find_sites
from relufy.model.sparsifiers import apply_sparsity
from relufy.model.structure import Projection

torch.set_num_threads(1)

IDS = torch.tensor([[3, 4, 5, 50, 7], [0, 1, 2, 9, 9]])


def weighing_alike(name: str = "llama") -> PreTrainedModel:
    """Return a model whose projections have columns of norm 1, exactly: four entries of 0.5 or -0.5 each."""
    model = families.family(name)
    generator = torch.Generator().manual_seed(3)
    for block in find_sites(model):
        for projection in block.projections().values():
            outputs, inputs = projection.shape
            rows = torch.rand(outputs, inputs, generator=generator).argsort(0)
            halves = torch.randint(0, 2, (outputs, inputs), generator=generator) - 0.5
            whole, weight = halves * (rows < 4), projection.module.weight
            weight.data.copy_(whole.T if isinstance(projection.module, Conv1D) else whole)  # type: ignore
            assert column_norms(projection).unique().tolist() == [1.0]
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "olmo2"])
def test_equal_norms_are_magnitude_top_k_bit_for_bit(name: str) -> None:
    method = Wina(sparsity=0.4, select="topk", allocation="uniform")
    found = sparsify(weighing_alike(name), method, drawn_windows())
    plain = [
        Sparsifier(s.sites, "topk", k=s.k, layers=s.layers) for s in sparsity_of(found).sparsifiers if s.k
    ]
    assert {s.k for s in plain} <= {round(0.6 * 24), round(0.6 * 43)}
    expected = apply_sparsity(weighing_alike(name), ActivationSparsity(tuple(plain)))
    assert torch.equal(found(IDS).logits, expected(IDS).logits)
    assert not torch.equal(found(IDS).logits, weighing_alike(name)(IDS).logits)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_equal_norms_have_the_thresholds_of_teal(name: str) -> None:
    windows = drawn_windows()
    wina = found_by(Wina(allocation="uniform"), weighing_alike(name), windows)
    teal = found_by(Teal(allocation="uniform"), weighing_alike(name), windows)
    expected = {(site, s.layers): s.threshold for s in teal.sparsifiers for site in s.sites}
    assert {(site, s.layers): s.threshold for s in wina.sparsifiers for site in s.sites} == expected
    assert len(expected) >= 12


def test_an_input_with_enough_zeros_of_its_own_gets_no_mask() -> None:
    relufied = sparsify(families.family("llama"), "relufy-stage1")
    found = found_by(Wina(sparsity=0.3, allocation="uniform"), relufied, drawn_windows())
    assert "down" not in {site for s in found.sparsifiers for site in s.sites}
    assert not any(key[1] == "down" for key in found.tensors)
    assert len(found.sparsifiers) == 12


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "falcon"])
def test_norms_are_those_of_the_columns_that_an_input_is_multiplied_with(name: str) -> None:
    """One input at a time: the norm of what the whole projection, fused or not, makes of it."""
    found = found_by(Wina(allocation="uniform"), families.family(name), drawn_windows())
    blocks = find_sites(families.family(name))
    assert {(s.layers, s.sites) for s in found.sparsifiers} == {
        ((block.index,), group) for block in blocks for group in block.groups()
    }
    for (layer, site, _), norms in found.tensors.items():
        projection: Projection = blocks[layer].projections()[site]
        with torch.no_grad():
            zero = projection.module(torch.zeros(1, projection.shape[1]))
            outputs = projection.module(torch.eye(projection.shape[1])) - zero
        assert norms.dtype == torch.float32
        torch.testing.assert_close(norms, outputs.norm(dim=1))


@pytest.mark.parametrize(
    ("select", "allocation"), [("threshold", "uniform"), ("topk", "uniform"), ("threshold", "greedy")]
)
def test_held_out_text_is_as_sparse_as_asked_for(select: str, allocation: str) -> None:
    calibration, held_out = written_windows()
    method = Wina(select=select, allocation=allocation, step=1.5)  # type: ignore[arg-type]
    found = measure_sparsity(sparsify(bundled_model(), method, calibration), held_out).sparsity
    blocks = find_sites(bundled_model())
    skipped = sum(found[g[0]][b.index] * parameters(b, g) for b in blocks for g in b.groups())
    assert skipped / sum(parameters(b, g) for b in blocks for g in b.groups()) == pytest.approx(0.5, abs=0.02)
    if allocation == "uniform":
        for site in ("q", "k", "v", "o", "gate", "up", "down"):
            assert found[site] == pytest.approx((0.5,) * len(blocks), abs=0.05), site


@pytest.mark.parametrize("select", ["threshold", "topk"])
def test_columns_of_different_weight_are_told_apart(select: str) -> None:
    """Where some columns are next to nothing, leaving these out costs less than leaving out small inputs."""

    def uneven() -> PreTrainedModel:
        model = families.family("llama")
        for block in find_sites(model):
            for projection in block.projections().values():
                weight: torch.Tensor = projection.module.weight  # type: ignore[assignment]
                weight.data[:, ::2] *= 0.02
        return model

    windows = drawn_windows()
    wina = sparsify(uneven(), Wina(select=select, allocation="uniform"), windows)  # type: ignore[arg-type]
    teal = sparsify(uneven(), Teal(allocation="uniform"), windows)
    assert fidelity(uneven(), wina, windows).kl < fidelity(uneven(), teal, windows).kl / 5


def test_projections_of_one_input_have_masks_of_their_own() -> None:
    model = sparsify(families.family("llama"), Wina(allocation="uniform"), drawn_windows())
    assert [s.sites for s in sparsity_of(model).sparsifiers if s.applies_to(1)] == [
        (site,) for site in ("q", "k", "v", "o", "gate", "up", "down")
    ]
    fused = sparsify(families.family("phi3"), Wina(allocation="uniform"), drawn_windows())
    assert hasattr(fused.model.layers[0].input_layernorm, "sparsifier")


def test_a_plain_relu_model_keeps_down_as_it_is() -> None:
    model = sparsify(families.family("opt"), Wina(allocation="uniform"), drawn_windows())
    assert "down" not in {site for s in sparsity_of(model).sparsifiers for site in s.sites}


def test_half_precision_finds_the_same_norms() -> None:
    windows = drawn_windows()
    halves = families.family("gpt2", torch.bfloat16)
    found = found_by(Wina(allocation="uniform"), halves, windows)
    exact = found_by(Wina(allocation="uniform"), halves.float(), windows)
    for key, norms in exact.tensors.items():
        assert torch.equal(found.tensors[key], norms)


def test_short_texts_are_refused() -> None:
    with pytest.raises(UserError, match="wina needs 512 or more"):
        sparsify(families.family("llama"), Wina(), drawn_windows()[:3])
