"""LaRoSA: an orthogonal basis in which all inputs are exact and few of them say more."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.methods.written import bundled_model, drawn_windows, found_by, written_windows
from transformers import AutoModelForCausalLM, PreTrainedModel

import families
import relufy
from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.engine.spec import decoder_spec
from relufy.errors import UserError
from relufy.hub import read_config
from relufy.measure.bytes_read import bytes_engine
from relufy.measure.quality import fidelity
from relufy.measure.sparsity import measure_sparsity
from relufy.method import LaRoSA
from relufy.methods import larosa as larosa_module
from relufy.methods.larosa import rotation
from relufy.methods.setting import Found
from relufy.methods.sparsify import sparsify
from relufy.model.checkpoint import load_model, save_checkpoint
from relufy.model.configuration import sparsity_of
from relufy.model.sparsifiers import apply_sparsity

torch.set_num_threads(1)

IDS = torch.tensor([[3, 4, 5, 50, 7], [0, 1, 2, 9, 9]])


def correlated(rank: int, width: int, count: int = 3000) -> torch.Tensor:
    """Return inputs that lie near a subspace of so many dimensions, f64."""
    generator = torch.Generator().manual_seed(0)
    inside = torch.randn(count, rank, generator=generator, dtype=torch.float64)
    directions = torch.randn(rank, width, generator=generator, dtype=torch.float64)
    return inside @ directions + 0.01 * torch.randn(count, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("width", "rank"), [(1, 1), (24, 24), (63, 5), (130, 1)])
def test_a_rotation_is_orthogonal(width: int, rank: int) -> None:
    x = correlated(rank, width)
    basis = rotation(x.T @ x)
    assert basis.dtype == torch.float64
    assert (basis.T @ basis - torch.eye(width)).abs().max() < 1e-10
    assert (basis @ basis.T - torch.eye(width)).abs().max() < 1e-10


def test_a_rotation_of_nothing_is_orthogonal_too() -> None:
    basis = rotation(torch.zeros(7, 7, dtype=torch.float64))
    assert (basis.T @ basis - torch.eye(7)).abs().max() < 1e-10


def test_the_first_directions_hold_the_most() -> None:
    x = correlated(3, 24)
    energy = (x @ rotation(x.T @ x)).square().mean(0)
    assert torch.equal(energy.sort(descending=True).values, energy)
    assert energy[:3].sum() > 0.999 * energy.sum()


@pytest.mark.parametrize("name", ["llama", "olmo2", "phi3", "falcon", "gpt2"])
def test_keeping_everything_is_exact_to_rounding(name: str) -> None:
    found = found_by(LaRoSA(), families.family(name), drawn_windows())
    widths = {"down": 43}
    everything = [
        Sparsifier(s.sites, "topk", k=widths.get(s.sites[0], 24), rotation=s.rotation, layers=s.layers)
        for s in found.sparsifiers
    ]
    model = sparsify(families.family(name), LaRoSA(), drawn_windows())
    apply_sparsity(model, ActivationSparsity(tuple(everything)))
    expected = families.family(name)(IDS).logits
    assert (model(IDS).logits - expected).norm() < 1e-5 * expected.norm()


SITES = {
    "llama": [(("q", "k", "v"), True), (("gate", "up"), True), (("o",), False), (("down",), False)],
    "phi3": [(("q", "k", "v"), True), (("gate", "up"), True), (("o",), False), (("down",), False)],
    "olmo2": [((site,), True) for site in ("q", "k", "v", "gate", "up")]
    + [(("o",), False), (("down",), False)],
    "falcon": [(("q", "k", "v", "up"), True), (("o",), False), (("down",), False)],
    "cohere": [(("q", "k", "v", "gate", "up"), True), (("o",), False), (("down",), False)],
    "gpt2": [(("q", "k", "v"), True), (("up",), True), (("o",), False), (("down",), False)],
    "opt": [(("q", "k", "v"), True), (("up",), True), (("o",), False)],
}


@pytest.mark.parametrize("name", SITES)
def test_sites_of_families_and_their_round_trip(name: str, tmp_path: Path) -> None:
    windows = drawn_windows()
    found = found_by(LaRoSA(sparsity=0.4), families.family(name), windows)
    assert [(s.sites, s.rotation) for s in found.sparsifiers if s.layers == (0,)] == SITES[name]
    for tensor in found.tensors.values():
        assert (tensor.T @ tensor - torch.eye(24)).abs().max() < 1e-5
    model = sparsify(families.family(name), LaRoSA(sparsity=0.4), windows)
    realised = measure_sparsity(model, windows).sparsity
    for sparsifier in found.sparsifiers:
        for site in sparsifier.sites:
            width = 43 if site == "down" else 24
            zeros = realised[site][sparsifier.layers[0]]  # type: ignore[index]
            assert zeros == pytest.approx(1 - sparsifier.k / width, abs=1e-6), site  # type: ignore[operator]
    save_checkpoint(model, None, tmp_path / "saved")
    for loaded in (load_model(tmp_path / "saved"), AutoModelForCausalLM.from_pretrained(tmp_path / "saved")):
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_readers_without_a_norm_of_their_own_share_one_basis() -> None:
    found = found_by(LaRoSA(), families.family("olmo2"), drawn_windows())
    assert torch.equal(found.tensors[0, "q", "rotation"], found.tensors[0, "v", "rotation"])
    assert not torch.equal(found.tensors[0, "q", "rotation"], found.tensors[0, "up", "rotation"])


def narrow() -> PreTrainedModel:
    """Return a model whose hidden states lie near a few directions: its embeddings do, its blocks whisper."""
    model = families.family("llama")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        thin = torch.randn(53, 6, generator=generator) @ torch.randn(6, 24, generator=generator)
        model.model.embed_tokens.weight.copy_(thin)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 0.05
            layer.mlp.down_proj.weight *= 0.05
    return model


def without_rotation(found: Found) -> tuple[Sparsifier, ...]:
    return tuple(Sparsifier(s.sites, "topk", k=s.k, layers=s.layers) for s in found.sparsifiers)


def test_correlated_inputs_err_less_than_with_plain_top_k() -> None:
    windows, held_out = drawn_windows(), drawn_windows(seed=1)
    model = sparsify(narrow(), LaRoSA(sparsity=0.7), windows)
    plain = ActivationSparsity(without_rotation(found_by(LaRoSA(sparsity=0.7), narrow(), windows)))
    assert (
        fidelity(narrow(), model, held_out).kl
        < fidelity(narrow(), apply_sparsity(narrow(), plain), held_out).kl / 2
    )


def test_real_text_errs_less_than_with_plain_top_k() -> None:
    calibration, held_out = written_windows()
    found = found_by(LaRoSA(), bundled_model(), calibration)
    dense = bundled_model()
    rotated = sparsify(bundled_model(), LaRoSA(), calibration)
    plain = apply_sparsity(bundled_model(), ActivationSparsity(without_rotation(found)))
    assert fidelity(dense, rotated, held_out).kl < fidelity(dense, plain, held_out).kl
    assert found.notes[0] == "quality reference: no fast path"


def test_moments_that_do_not_fit_together_are_summed_in_more_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = found_by(LaRoSA(), families.family("llama"), drawn_windows())
    monkeypatch.setattr(larosa_module, "MOMENT_BYTES", 3 * 8 * 24 * 24)
    apart = found_by(LaRoSA(), families.family("llama"), drawn_windows())
    assert apart.sparsifiers == at_once.sparsifiers and apart.notes == at_once.notes
    assert all(torch.equal(apart.tensors[key], tensor) for key, tensor in at_once.tensors.items())


def test_the_engine_and_its_bytes_refuse_by_name(tmp_path: Path) -> None:
    folder = save_checkpoint(
        sparsify(families.family("llama"), LaRoSA(), drawn_windows()), None, tmp_path / "saved"
    )
    with pytest.raises(UserError, match="LaRoSA's rotation has no fast path in the engine"):
        relufy.pack(folder, tmp_path / "packed.relufy")
    with pytest.raises(UserError, match="no fast path"):
        bytes_engine(decoder_spec(read_config(folder)), {}, 16)
    assert not (tmp_path / "packed.relufy").exists()


def test_the_first_position_of_a_window_says_nothing() -> None:
    windows = drawn_windows()
    other = windows.copy()
    other[:, 0] = np.random.default_rng(9).integers(0, 53, len(windows))
    model = families.family("llama")
    for layer in model.model.layers:  # so that nothing else sees the first token
        layer.self_attn.o_proj.weight.data.zero_()
    tensors = [found_by(LaRoSA(), model, text).tensors for text in (windows, other)]
    assert torch.equal(tensors[0][0, "q", "rotation"], tensors[1][0, "q", "rotation"])


def test_a_relu_on_the_same_input_is_refused() -> None:
    relufied = sparsify(families.family("llama"), "relufy-stage2")
    with pytest.raises(UserError, match="the model already has relu at 'q'"):
        sparsify(relufied, LaRoSA(), drawn_windows())
    assert all(s.function == "relu" for s in sparsity_of(relufied).sparsifiers)
