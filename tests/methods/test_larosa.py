"""LaRoSA: rotations are orthogonal, a top-k of everything is dense, zeros are those of the rotated basis."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.methods.calibrated import IDS, calibrated, realised, saved_and_loaded, text
from tests.methods.written import bundled_model, found_by, written_windows
from transformers import PreTrainedModel

import families
import relufy
from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.engine.spec import decoder_spec
from relufy.errors import UserError
from relufy.hub import read_config
from relufy.measure.bytes_read import bytes_engine
from relufy.measure.quality import fidelity
from relufy.method import LaRoSA
from relufy.methods.larosa import NOTE, _passes, rotation
from relufy.methods.setting import Found
from relufy.methods.sparsify import as_recipe, find, make_setting, sparsify
from relufy.model.checkpoint import save_checkpoint
from relufy.model.configuration import sparsity_of
from relufy.model.observe import observe_sites
from relufy.model.sites import find_sites
from relufy.model.sparsifiers import apply_sparsity


def test_rotations_are_orthogonal_and_sort_by_variance() -> None:
    x = torch.randn(500, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x * torch.linspace(1, 5, 24)
    q = rotation(x.T @ x)
    assert (q.T @ q - torch.eye(24)).abs().max() < 1e-10
    lengths = (x @ q).square().sum(0)
    assert (lengths.diff() < 0).all()


@pytest.mark.parametrize("name", ["llama", "phi", "gpt2", "olmo2"])
def test_keeping_everything_is_dense(name: str) -> None:
    model = calibrated(name, LaRoSA(sparsity=1e-6))
    expected = families.family(name)(IDS).logits
    assert not torch.equal(model(IDS).logits, expected)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "phi", "phi3", "gpt2", "olmo2", "falcon"])
def test_zeros_are_counted_in_the_rotated_basis(name: str) -> None:
    assert abs(realised(calibrated(name, LaRoSA(sparsity=0.4)), text(seed=1)) - 0.4) < 0.02


def test_inputs_are_made_of_the_greatest_components() -> None:
    model = calibrated("llama", LaRoSA(sparsity=0.5))
    mask = model.model.layers[0].input_layernorm.sparsifier
    x, q = torch.randn(7, 24), mask.rotation
    components = x @ q
    cut = components.abs().sort(descending=True).values[:, 11:12]
    expected = torch.where(components.abs() >= cut, components, 0) @ q.T
    torch.testing.assert_close(mask(x), expected)


def test_o_and_down_stay_in_their_basis() -> None:
    sparsifiers = sparsity_of(calibrated("llama", LaRoSA())).sparsifiers
    assert {s.sites: s.rotation for s in sparsifiers} == {
        ("q", "k", "v"): True,
        ("gate", "up"): True,
        ("o",): False,
        ("down",): False,
    }


def test_a_parallel_block_has_one_rotation() -> None:
    first, *_ = sparsity_of(calibrated("phi", LaRoSA())).sparsifiers
    assert first.sites == ("q", "k", "v", "up")


def test_dense_tokens_pass_bit_for_bit() -> None:
    model = calibrated("llama", LaRoSA(phase="decode"))
    with observe_sites(model) as observer:
        assert torch.equal(model(IDS).logits, families.family("llama")(IDS).logits)
    assert max(observer.sparsity()["q"]) == 0
    first = calibrated("llama", LaRoSA(dense_first_tokens=3))
    assert torch.equal(first(IDS).logits[:, :3], families.family("llama")(IDS).logits[:, :3])
    assert not torch.equal(first(IDS).logits[:, 3:], families.family("llama")(IDS).logits[:, 3:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2", "phi3", "falcon"])
def test_saved_and_loaded_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = calibrated(name, LaRoSA(), dtype)
    loaded = saved_and_loaded(model, tmp_path / "saved", dtype)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_adapters_see_what_the_weights_see() -> None:
    model = calibrated("llama", LaRoSA())
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"], r=2))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    before = adapted.eval()(IDS).logits
    torch.testing.assert_close(adapted.merge_and_unload()(IDS).logits, before, rtol=1e-3, atol=1e-3)


def test_the_engine_refuses_it_by_name(tmp_path: Path) -> None:
    save_checkpoint(calibrated("llama", LaRoSA()), None, tmp_path / "larosa")
    reason = r"LaRoSA's rotation has no fast path in the engine \(input of q\)"
    with pytest.raises(UserError, match=reason):
        relufy.pack(tmp_path / "larosa", tmp_path / "m.relufy")
    assert not (tmp_path / "m.relufy").exists()
    engine = relufy.info(tmp_path / "larosa")["engine"]
    assert not engine["supported"]
    assert "no fast path" in engine["reason"]


def test_its_bytes_are_refused_by_name(tmp_path: Path) -> None:
    folder = save_checkpoint(calibrated("llama", LaRoSA()), None, tmp_path / "larosa")
    with pytest.raises(UserError, match="no fast path"):
        bytes_engine(decoder_spec(read_config(folder)), {}, 16)


def test_readers_without_a_norm_of_their_own_share_one_basis() -> None:
    tensors = found_by(LaRoSA(), families.family("olmo2"), text()).tensors
    assert torch.equal(tensors[0, "q", "rotation"], tensors[0, "v", "rotation"])
    assert not torch.equal(tensors[0, "q", "rotation"], tensors[0, "up", "rotation"])


def without_rotation(found: Found) -> ActivationSparsity:
    return ActivationSparsity(
        tuple(Sparsifier(s.sites, "topk", k=s.k, layers=s.layers) for s in found.sparsifiers)
    )


def narrow() -> PreTrainedModel:
    """Return a model whose hidden states lie near 6 directions: its embeddings do, its blocks whisper."""
    model, generator = families.family("llama"), torch.Generator().manual_seed(0)
    thin = torch.randn(53, 6, generator=generator) @ torch.randn(6, 24, generator=generator)
    model.model.embed_tokens.weight.data.copy_(thin)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.05
        layer.mlp.down_proj.weight.data *= 0.05
    return model


def test_correlated_inputs_err_less_than_with_plain_top_k() -> None:
    rotated = sparsify(narrow(), LaRoSA(sparsity=0.7), text())
    found = found_by(LaRoSA(sparsity=0.7), narrow(), text())
    plain = apply_sparsity(narrow(), without_rotation(found))
    divergence = [fidelity(narrow(), model, text(seed=1)).kl for model in (rotated, plain)]
    assert divergence[0] < divergence[1] / 2


def test_real_text_errs_less_than_with_plain_top_k() -> None:
    calibration, held_out = written_windows()
    found, dense = found_by(LaRoSA(), bundled_model(), calibration), bundled_model()
    rotated = sparsify(bundled_model(), LaRoSA(), calibration)
    plain = apply_sparsity(bundled_model(), without_rotation(found))
    assert fidelity(dense, rotated, held_out).kl < fidelity(dense, plain, held_out).kl


def test_a_relu_on_the_same_input_is_refused() -> None:
    relufied = sparsify(families.family("llama"), "relufy-stage2")
    with pytest.raises(UserError, match="the model already has relu at 'q'"):
        sparsify(relufied, LaRoSA(), text())
    assert all(s.function == "relu" for s in sparsity_of(relufied).sparsifiers)


def test_its_notes_say_so() -> None:
    setting = make_setting(families.family("llama"), as_recipe(LaRoSA()), text())
    assert NOTE in find(LaRoSA(), setting).notes


def test_moments_are_summed_in_as_many_passes_as_memory_asks_for() -> None:
    widths = {(layer, site): 4096 for layer in range(32) for site in ("q", "gate")}
    parts = list(_passes(widths))
    assert {place: width for part in parts for place, width in part.items()} == widths
    assert [len(part) for part in parts] == [8] * 8
    assert list(_passes({(0, "q"): 24, (0, "gate"): 24})) == [{(0, "q"): 24, (0, "gate"): 24}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": ("o",)}, "a rotation needs the input of q, k, v, gate, up"),
        ({"per_channel": ("weight",)}, "without per_channel or correction"),
        ({"correction": "low_rank"}, "without per_channel or correction"),
        ({"sites": ("q",), "function": "relu", "k": None}, "rotation belongs to threshold, topk"),
    ],
)
def test_rotations_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sparsifier(**{"sites": ("q",), "function": "topk", "k": 3, "rotation": True} | changes)


def test_a_rotation_of_another_width_is_refused() -> None:
    model = families.family("llama")
    sparsity = ActivationSparsity((Sparsifier(("q",), "topk", k=3, rotation=True),))
    names = [f"{block.q.name}.sparsifier.rotation" for block in find_sites(model)]
    with pytest.raises(UserError, match=r"should be floating-point \[24, 24\]"):
        apply_sparsity(model, sparsity, dict.fromkeys(names, torch.eye(23)))
