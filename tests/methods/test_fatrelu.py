"""FATReLU: ReLU models get sparser, layers that are sparse enough stay, and others are refused."""

import pytest
import torch
import transformers as hf
from tests.methods.written import bundled_model, drawn_windows, found_by, written_windows

import families
from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.errors import UserError
from relufy.measure.sparsity import measure_sparsity
from relufy.method import FatRelu, Relufication
from relufy.methods.sparsify import sparsify
from relufy.model.checkpoint import load_model, save_checkpoint
from relufy.model.configuration import sparsity_of
from relufy.model.sparsifiers import apply_sparsity
from relufy.recipe import load_recipe

IDS = torch.tensor([[3, 4, 5, 50, 7], [0, 1, 2, 9, 9]])
NEURON = ("neuron",)


def with_activation(function: str, **fields) -> hf.PreTrainedModel:
    model = families.family("llama")
    return apply_sparsity(model, ActivationSparsity((Sparsifier(NEURON, function, **fields),)))


def with_a_sparse_layer() -> hf.PreTrainedModel:
    """Return a ReLU model whose layer 1 has next to no positive gates."""
    config = hf.LlamaConfig(**families.LLAMA_LIKE, mlp_bias=True, hidden_act="relu")
    model = families.build(config)
    model.model.layers[1].mlp.gate_proj.bias.data -= 9
    return model


def test_held_out_text_is_as_sparse_as_asked_for() -> None:
    calibration, held_out = written_windows()
    relufied = sparsify(bundled_model(), Relufication())
    before = measure_sparsity(relufied, held_out).sparsity["neuron"]
    sparsify(relufied, FatRelu(sparsity=0.75), calibration)
    after = measure_sparsity(relufied, held_out).sparsity
    assert min(before) < 0.5 and max(before) > 0.75
    assert all(share == pytest.approx(0.75, abs=0.02) for share in after["neuron"])
    assert [s.function for s in sparsity_of(relufied).sparsifiers] == ["fatrelu", "relu", *["fatrelu"] * 4]
    assert after["down"] == after["neuron"]


def test_what_is_kept_is_what_relu_puts_out() -> None:
    model = sparsify(with_activation("relu"), FatRelu(sparsity=0.8), drawn_windows())
    z = torch.linspace(-3, 3, 1001)
    for layer, sparsifier in zip(model.model.layers, sparsity_of(model).sparsifiers, strict=True):
        assert sparsifier.function == "fatrelu" and sparsifier.threshold > 0
        expected = torch.where(z >= sparsifier.threshold, z.relu(), 0)
        assert torch.equal(layer.mlp.act_fn(z), expected)


def test_a_layer_that_is_sparse_enough_keeps_its_relu_and_a_note_says_so() -> None:
    windows = drawn_windows()
    found = found_by(FatRelu(sparsity=0.7), with_a_sparse_layer(), windows)
    assert [(s.function, s.sites, s.layers) for s in found.sparsifiers] == [
        ("fatrelu", NEURON, (0,)),
        ("relu", NEURON, (1,)),
    ]
    assert found.notes[1:] == ("1 of 2 layers had 70 % zeros already and stay as they are (layers 1)",)
    model = sparsify(with_a_sparse_layer(), FatRelu(sparsity=0.7), windows)
    realised = measure_sparsity(model, windows).sparsity["neuron"]
    assert realised[0] == pytest.approx(0.7, abs=0.02)
    assert realised[1] > 0.8


def test_a_target_of_next_to_nothing_changes_nothing() -> None:
    relufied = with_activation("relu")
    expected = relufied(IDS).logits
    with pytest.warns(UserWarning, match="nothing was changed"):
        sparsify(relufied, FatRelu(sparsity=1e-9), drawn_windows())
    assert torch.equal(relufied(IDS).logits, expected)


@pytest.mark.parametrize("name", ["opt", "opt_post_norm"])
def test_a_model_with_relu_of_its_own(name: str, tmp_path) -> None:
    windows = drawn_windows()
    model = sparsify(families.family(name), FatRelu(sparsity=0.8), windows)
    assert measure_sparsity(model, windows).sparsity["neuron"][0] == pytest.approx(0.8, abs=0.02)
    assert model.config.activation_function == "relufy"
    save_checkpoint(model, None, tmp_path / "saved")
    assert torch.equal(load_model(tmp_path / "saved")(IDS).logits, model(IDS).logits)


def test_a_helu_becomes_a_fatrelu_and_a_lower_fatrelu_a_higher_one() -> None:
    windows = drawn_windows()
    expected = found_by(FatRelu(sparsity=0.8), with_activation("relu"), windows).sparsifiers
    for model in (with_activation("helu"), with_activation("fatrelu", threshold=1e-3)):
        found = found_by(FatRelu(sparsity=0.8), model, windows).sparsifiers
        assert found[0] == expected[0]
        sparsify(model, FatRelu(sparsity=0.8), windows)
    model = with_activation("fatrelu", threshold=50.0)
    kept = found_by(FatRelu(sparsity=0.8), model, windows).sparsifiers
    assert [s.threshold for s in kept] == [50.0, 50.0]


def test_a_threshold_never_falls_below_the_one_that_is_there() -> None:
    """Also where both lie in one bin of the sketch: the model is refused if zeros would be taken back."""
    windows = drawn_windows()
    zeros = measure_sparsity(with_activation("fatrelu", threshold=0.5), windows).sparsity["neuron"]
    model = sparsify(with_activation("fatrelu", threshold=0.5), FatRelu(sparsity=max(zeros) + 1e-4), windows)
    assert all(s.threshold >= 0.5 for s in sparsity_of(model).sparsifiers)  # type: ignore[operator]


def test_stage_2_keeps_the_relus_on_its_inputs() -> None:
    windows = drawn_windows()
    model = sparsify(families.family("llama"), Relufication(stage=2))
    before = measure_sparsity(model, windows).sparsity
    sparsify(model, FatRelu(sparsity=0.8), windows)
    after = measure_sparsity(model, windows).sparsity
    assert after["q"][0] == before["q"][0] > 0.3
    assert after["neuron"][0] > before["neuron"][0]
    assert min(after["up"]) > 0.3


@pytest.mark.parametrize(
    ("function", "fields", "message"),
    [
        ("relu2", {}, "layer 0 has relu2 at 'neuron'; teal or scap"),
        ("drelu", {}, "layer 0 has drelu at 'neuron'"),
        ("statistical_topk", {"sparsity": 0.8}, "layer 0 has statistical_topk at"),
        ("relu", {"shift": 0.5}, "plain ReLU, and layer 0 has relu with shift 0.5 at 'neuron'"),
    ],
    ids=["relu2", "drelu", "statistical", "shifted"],
)
def test_other_activations_are_refused(function: str, fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sparsify(with_activation(function, **fields), FatRelu(), drawn_windows())


def test_a_model_without_zeros_is_told_to_be_relufied_first() -> None:
    for name in ("llama", "gpt2"):
        with pytest.raises(UserError, match="layer 0 makes no zeros; relufy the model first"):
            sparsify(families.family(name), FatRelu(), drawn_windows())
    with pytest.raises(UserError, match="layer 0 has relu2"):
        sparsify(families.family("nemotron"), FatRelu(), drawn_windows())


def test_one_threshold_for_all_layers_needs_no_text() -> None:
    model, threshold = with_activation("relu"), 0.01
    gates = torch.linspace(-1, 1, 1001)
    sparsify(model, FatRelu(threshold=threshold))
    assert sparsity_of(model).sparsifiers == (Sparsifier(NEURON, "fatrelu", threshold=threshold),)
    assert "calibration_tokens" not in sparsity_of(model).provenance
    for layer in model.model.layers:
        expected = torch.where(gates >= threshold, gates, 0.0)
        assert torch.equal(layer.mlp.act_fn(gates), expected)


def test_a_higher_threshold_stays_and_a_note_says_so() -> None:
    fats = tuple(Sparsifier(NEURON, "fatrelu", threshold=t, layers=(i,)) for i, t in enumerate((0.005, 0.2)))
    model = apply_sparsity(families.family("llama"), ActivationSparsity(fats))
    found = found_by(FatRelu(threshold=0.01), model, drawn_windows())
    assert [(s.threshold, s.layers) for s in found.sparsifiers] == [(0.01, (0,)), (0.2, (1,))]
    assert found.notes == ("layers 1 had a higher threshold already and stay as they are",)
    sparsify(model, FatRelu(threshold=0.01))
    assert [s.threshold for s in sparsity_of(model).sparsifiers] == [0.01, 0.2]


def test_a_threshold_stands_in_for_relu_alone_too() -> None:
    with pytest.raises(UserError, match=r"plain ReLU, and layer 0 has relu with shift 0\.5"):
        sparsify(with_activation("relu", shift=0.5), FatRelu(threshold=0.01))
    with pytest.raises(UserError, match="layer 0 makes no zeros"):
        sparsify(families.family("llama"), FatRelu(threshold=0.01))


def test_sparsity_or_threshold_not_both() -> None:
    assert FatRelu() == FatRelu(sparsity=0.9) != FatRelu(threshold=0.01)
    with pytest.raises(UserError, match=r"a sparsity, .* or one threshold for all; set the other to null"):
        FatRelu(sparsity=0.9, threshold=0.01)
    for threshold in (0.0, -1.0, float("inf")):
        with pytest.raises(UserError, match="threshold must be a finite number above 0"):
            FatRelu(threshold=threshold)
    shipped = load_recipe("fatrelu").with_values(["sparsify.sparsity=null", "sparsify.threshold=0.02"])
    assert shipped.sparsify == FatRelu(threshold=0.02)


@pytest.mark.parametrize("fields", [{"phase": "decode"}, {"dense_first_tokens": 1}], ids=str)
def test_an_activation_has_no_phase(fields: dict) -> None:
    with pytest.raises(UserError, match="fatrelu acts on every token"):
        sparsify(with_activation("relu"), FatRelu(**fields), drawn_windows())
