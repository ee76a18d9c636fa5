"""Relufication: every activation, and a shift that gives the calibration text the sparsity it promises."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.methods.written import bundled_model, drawn_windows, found_by, written_windows
from transformers import AutoModelForCausalLM, PreTrainedModel

import families
import relufy
from relufy.activation_sparsity import Sparsifier
from relufy.errors import UserError
from relufy.measure.preactivations import measure_preactivations
from relufy.measure.sparsity import measure_sparsity
from relufy.method import Relufication
from relufy.methods.calibrate import PRE_ACTIVATION, Probe, collect
from relufy.methods.setting import Setting
from relufy.methods.sparsify import sparsify
from relufy.model.checkpoint import load_model, save_checkpoint
from relufy.model.configuration import sparsity_of
from relufy.model.sites import find_sites

torch.set_num_threads(1)

IDS = torch.tensor([[0, 4, 9, 33, 7, 20, 5, 11, 50, 12]])
NEURON = ("neuron",)
METHODS: dict[str, dict[str, Any]] = {
    "helu": {"activation": "helu", "width": 0.2},
    "relu2": {"activation": "relu2"},
    "drelu": {"activation": "drelu"},
    "shifted": {"sparsity": 0.8},
    "shifted_relu2": {"activation": "relu2", "sparsity": 0.8},
    "per_layer": {"sparsity": 0.8, "per_layer": True},
    "per_layer_helu": {"activation": "helu", "sparsity": 0.8, "per_layer": True, "width": 0.01},
}
BY_FAMILY = [(name, family) for name in METHODS for family in ("llama", "gpt2") if name != "drelu"]
BY_FAMILY += [("drelu", "llama")]


def zeros_of(model: PreTrainedModel, windows: np.ndarray, layer: int) -> float:
    """Return the share of zeros that a layer's activation puts out, at the positions that are counted."""
    rows: list[torch.Tensor] = []
    collect(Setting(model, find_sites(model)), windows, [Probe(layer, "neuron", rows.append)], "")
    return float((torch.cat(rows) == 0).double().mean())


def preactivations_of(model: PreTrainedModel, windows: np.ndarray, layer: int) -> torch.Tensor:
    rows: list[torch.Tensor] = []
    collect(Setting(model, find_sites(model)), windows, [Probe(layer, PRE_ACTIVATION, rows.append)], "")
    return torch.cat(rows)


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt", "falcon"])
def test_the_preactivation_is_what_gate_or_up_puts_out(name: str) -> None:
    model, windows = families.family(name), drawn_windows()
    block, seen = find_sites(model)[1], []
    module = (block.gate or block.up).module
    handle = module.register_forward_hook(lambda _m, _a, output: seen.append(output[..., :43]))
    found = preactivations_of(model, windows, 1)
    handle.remove()
    batches = [part.reshape(-1, 33, 43) for part in seen if part.numel() > 43]  # one token finds the norms
    expected = torch.cat([part[:, 1:].flatten(0, 1) for part in batches])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("sparsity", [0.3, 0.9, 0.97])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_calibration_text_is_as_sparse_as_predicted(
    name: str, sparsity: float, dtype: torch.dtype
) -> None:
    """Exactly in the first layer; the next ones read what its new zeros made of the hidden states."""
    windows, method = drawn_windows(), Relufication(sparsity=sparsity, per_layer=True)
    model = families.family(name, dtype)
    before = preactivations_of(model, windows, 0)
    shift = sparsity_of(sparsify(model, method, windows)).sparsifiers[0].shift
    predicted = float((before.float() <= shift).double().mean())
    assert zeros_of(model, windows, 0) == predicted
    assert sparsity <= predicted < sparsity + 0.02
    assert zeros_of(model, windows, 1) == pytest.approx(sparsity, abs=0.15)


def test_one_shift_makes_the_mean_over_layers_what_was_asked_for() -> None:
    model, windows = families.family("llama"), drawn_windows()
    layers = [preactivations_of(model, windows, layer) for layer in (0, 1)]
    layers_zeros = [lambda shift, z=z: float((z <= shift).double().mean()) for z in layers]
    (found,) = found_by(Relufication(sparsity=0.8), model, windows).sparsifiers
    predicted = [zeros(found.shift) for zeros in layers_zeros]
    assert found.layers is None and 0.8 <= sum(predicted) / 2 < 0.805
    assert abs(predicted[0] - 0.8) > 0.01  # the layers differ
    bin_below = found.shift * (1 - 2**-7)
    assert sum(zeros(bin_below) for zeros in layers_zeros) / 2 < 0.8


def test_held_out_text_of_a_trained_model_is_nearly_as_sparse_before_any_fine_tune() -> None:
    calibration, held_out = written_windows()
    model = bundled_model()
    original = measure_preactivations(model, calibration)
    sparsify(model, Relufication(sparsity=0.9), calibration)
    (neuron,) = sparsity_of(model).sparsifiers
    assert neuron.shift == pytest.approx(original.shift_for(0.9), rel=0.05)
    realised = measure_sparsity(model, held_out).sparsity["neuron"]
    predicted = original.sparsity(neuron.shift)
    assert original.mean_sparsity(neuron.shift) == pytest.approx(0.9, abs=0.01)
    assert realised[0] == pytest.approx(predicted[0], abs=0.01)
    assert np.mean(realised) == pytest.approx(0.9, abs=0.05)
    assert sparsity_of(model).provenance["calibration_tokens"] == calibration.size


def test_notes_say_what_was_measured() -> None:
    model, windows = families.family("llama"), drawn_windows()
    found = found_by(Relufication(sparsity=0.8), model, windows)
    counted, chosen = found.notes
    assert counted.startswith("calibrated on 768 positions")
    assert chosen.startswith(f"shift {found.sparsifiers[0].shift:.4g} for 80 %: predicted sparsity 80.")
    assert "without a shift" in chosen and "(layers" in chosen
    found = found_by(Relufication(sparsity=0.2, per_layer=True), model, windows)
    assert found.notes[1].startswith("shift -") and " to -" in found.notes[1]
    assert "fewer zeros than a plain ReLU (layers 0, 1)" in found.notes[2]
    heard: list[str] = []
    sparsify(model, Relufication(sparsity=0.2, per_layer=True), windows, on_note=heard.append)
    assert tuple(heard) == found.notes


@pytest.mark.parametrize(("name", "family"), BY_FAMILY, ids=lambda value: value)
def test_it_is_saved_loaded_and_run_by_the_engine(name: str, family: str, tmp_path: Path) -> None:
    model = sparsify(families.family(family), Relufication(**METHODS[name]), drawn_windows())
    expected = logits_of(model)
    save_checkpoint(model, None, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert sparsity_of(loaded).sparsifiers == sparsity_of(model).sparsifiers
    assert repr(loaded) == repr(model)  # a HeLU's width too
    assert torch.equal(logits_of(loaded), expected)
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits_of(native), expected)
    engine = relufy.Engine(relufy.pack(tmp_path / "model", tmp_path / "packed.relufy"), threads=1)
    found = engine.step([(engine.new_sequence(), IDS[0].tolist())], "all")
    error = np.linalg.norm(found - expected[0].numpy(), axis=1) / expected[0].norm(dim=1).numpy()
    assert error.max() < 1e-4


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"activation": "helu"}, "relu"),
        ({"activation": "relu2"}, "relu2"),
        ({"activation": "drelu"}, "relufy"),
        ({"shift": 0.1}, "relufy"),
    ],
    ids=str,
)
def test_stock_transformers_gets_a_name_that_computes_the_same_or_none(fields: dict, name: str) -> None:
    assert sparsify(families.family("llama"), Relufication(**fields)).config.hidden_act == name


def test_width_reaches_the_gradient_and_the_checkpoint_leaves_the_usual_one_out() -> None:
    model = sparsify(families.family("llama"), Relufication(activation="helu", width=0.3))
    assert {layer.mlp.act_fn.width for layer in model.model.layers} == {0.3}
    assert sparsity_of(model).to_block()["sparsifiers"] == [
        {"sites": ["neuron"], "function": "helu", "width": 0.3}
    ]
    usual = sparsify(families.family("llama"), Relufication(activation="helu"))
    assert sparsity_of(usual).to_block()["sparsifiers"] == [{"sites": ["neuron"], "function": "helu"}]


@pytest.mark.parametrize("name", ["helu", "drelu", "shifted", "per_layer_helu"])
def test_stage_2_keeps_the_activations_of_stage_1(name: str) -> None:
    model = sparsify(families.family("llama"), Relufication(**METHODS[name]), drawn_windows())
    stage_1 = sparsity_of(model).sparsifiers
    sparsify(model, Relufication(stage=2))
    assert sparsity_of(model).sparsifiers == (
        *stage_1,
        Sparsifier(("q", "k", "v"), "relu"),
        Sparsifier(("gate", "up"), "relu"),
    )
    assert (measure_sparsity(model, drawn_windows()).mean["q"]) > 0.3


def test_another_shift_than_the_models_own_is_refused() -> None:
    model = sparsify(families.family("llama"), Relufication(shift=0.5))
    with pytest.raises(UserError, match=r"has relu with shift 0\.5 .* would become relu with shift 0\.2"):
        sparsify(model, Relufication(stage=2, shift=0.2))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "both": ({"shift": 0.5, "sparsity": 0.9}, "a shift or the sparsity that it is taken from, not both"),
    "share": ({"sparsity": 90.0}, r"between 0 and 1, found 90\.0"),
    "drelu_shift": ({"activation": "drelu", "shift": 0.1}, "drelu has no shift"),
    "drelu_sparsity": ({"activation": "drelu", "sparsity": 0.9}, "drelu has no shift"),
    "per_layer": ({"per_layer": True}, "per_layer needs the sparsity"),
    "width": ({"width": 0.1}, "width belongs to helu; relu has none"),
    "negative": ({"activation": "helu", "width": -0.1}, "width 0 or greater"),
    "infinite": ({"shift": math.inf}, "shift must be finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(case: str) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        Relufication(**fields)


def test_a_model_or_a_text_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="drelu needs a gate, and GPT2LMHeadModel has a plain MLP"):
        sparsify(families.family("gpt2"), Relufication(activation="drelu"))
    with pytest.raises(UserError, match="one projection makes gate and up"):
        sparsify(families.family("phi3"), Relufication(activation="drelu"))
    with pytest.raises(UserError, match="a shift for a sparsity needs text to calibrate on"):
        sparsify(families.family("llama"), Relufication(sparsity=0.9))
