"""SCAP: magnitude thresholds where the centre is 0, exact at the centre, and the centre that errs least."""

from pathlib import Path

import pytest
import torch
from tests.methods.written import bundled_model, drawn_windows, found_by, written_windows
from transformers import PreTrainedModel

import families
from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.errors import UserError
from relufy.measure.quality import fidelity
from relufy.measure.sketch import Sketch
from relufy.measure.sparsity import measure_sparsity
from relufy.method import Relufication, Scap, Teal
from relufy.methods.setting import Found
from relufy.methods.sparsify import sparsify
from relufy.model.checkpoint import load_model, save_checkpoint
from relufy.model.configuration import sparsity_of
from relufy.model.sparsifiers import apply_sparsity

IDS = torch.tensor([[3, 4, 5, 50, 7], [0, 1, 2, 9, 9]])


def off_centre(middle: float = 0.5, spread: float = 0.1) -> PreTrainedModel:
    """Return a GPT-2 whose MLPs read values around `middle`."""
    model = families.family("gpt2")
    for block in model.transformer.h:
        block.ln_2.weight.data.fill_(spread)
        block.ln_2.bias.data.fill_(middle)
    return model


def places(found: Found) -> list[tuple[tuple[str, ...], tuple[int, ...] | None]]:
    return [(s.sites, s.layers) for s in found.sparsifiers]


def test_centre_0_is_teal_at_these_sites() -> None:
    windows = written_windows()[0]
    scap = found_by(Scap(sparsity=0.4, sparsity_down=0.4, centre="zero"), bundled_model(), windows)
    teal = found_by(Teal(sparsity=0.4, allocation="uniform"), bundled_model(), windows)
    expected = {s for s in teal.sparsifiers if s.sites in (("gate", "up"), ("down",))}
    assert set(scap.sparsifiers) == expected
    assert len(scap.sparsifiers) == 12 and not scap.tensors


@pytest.mark.parametrize("centre", ["zero", "median", "mode", "best"])
def test_a_target_of_next_to_nothing_is_dense(centre: str) -> None:
    method = Scap(sparsity=1e-9, sparsity_down=1e-9, centre=centre)  # type: ignore[arg-type]
    model = sparsify(off_centre(), method, drawn_windows())
    assert torch.equal(model(IDS).logits, off_centre()(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_constant_input_at_the_centre_is_exact_with_everything_skipped(dtype: torch.dtype) -> None:
    middle = 0.5 + 2**-9 if dtype == torch.float32 else 0.5  # of the sketch's bin, and its edge
    dense = off_centre(middle, spread=0.0).to(dtype)
    model, windows = off_centre(middle, spread=0.0).to(dtype), drawn_windows()
    if dtype == torch.float32:
        sparsify(model, Scap(centre="median", sparsity_down=1e-9), windows)
        assert model.transformer.h[0].ln_2.sparsifier.centre.unique().tolist() == [middle]
    else:
        mask = Sparsifier(("up",), "threshold", threshold=9.0, per_channel=("centre",))
        names = [f"transformer.h.{layer}.ln_2.sparsifier.centre" for layer in (0, 1)]
        apply_sparsity(model, ActivationSparsity((mask,)), {n: torch.full((24,), middle) for n in names})
    assert torch.equal(model(IDS).logits, dense(IDS).logits)
    assert measure_sparsity(model, windows).sparsity["up"] == (1.0, 1.0)


def test_the_best_centre_errs_least() -> None:
    windows, dense = drawn_windows(), off_centre()
    divergence = {}
    for centre in ("zero", "median", "mode", "best"):
        model = sparsify(off_centre(), Scap(sparsity=0.6, centre=centre), windows)  # type: ignore[arg-type]
        divergence[centre] = fidelity(dense, model, windows).kl
    assert divergence["best"] == pytest.approx(min(divergence.values()), rel=0.1)
    assert divergence["best"] < divergence["zero"] / 10
    found = found_by(Scap(sparsity=0.6), off_centre(), windows)
    assert found.sparsifiers[0] == Sparsifier(
        ("up",), "threshold", threshold=found.sparsifiers[0].threshold, per_channel=("centre",), layers=(0,)
    )
    assert found.tensors[0, "up", "centre"].unique().item() == pytest.approx(0.5, abs=0.02)


def test_where_no_centre_helps_there_is_none() -> None:
    """Random weights: inputs that lie around zero, alike on both sides."""
    model = sparsify(families.family("llama"), Scap(), drawn_windows())
    assert not any(sparsifier.per_channel for sparsifier in sparsity_of(model).sparsifiers)
    assert model.config.hidden_act == "silu"


def test_held_out_text_is_as_sparse_as_asked_for() -> None:
    calibration, held_out = written_windows()
    model = sparsify(bundled_model(), Scap(sparsity=0.5, sparsity_down=0.7, centre="median"), calibration)
    realised = measure_sparsity(model, held_out).mean
    assert realised["up"] == realised["gate"] == pytest.approx(0.5, abs=0.02)
    assert realised["down"] == pytest.approx(0.7, abs=0.02)
    assert realised["q"] == realised["neuron"] == 0


SITES = {
    "llama": [("gate", "up"), ("down",)],
    "phi3": [("gate", "up"), ("down",)],
    "cohere": [("gate", "up"), ("down",)],
    "olmo2": [("gate",), ("up",), ("down",)],
    "gpt2": [("up",), ("down",)],
    "falcon": [("up",), ("down",)],
    "phi": [("up",), ("down",)],
    "opt": [("up",)],
    "nemotron": [("up",)],
}


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_sites_and_round_trip_of_families(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    windows, method = drawn_windows(), Scap(centre="median")
    found = found_by(method, families.family(name, dtype), windows)
    assert [place for place in places(found) if place[1] == (0,)] == [(s, (0,)) for s in SITES[name]]
    model = sparsify(families.family(name, dtype), method, windows)
    realised = measure_sparsity(model, windows).sparsity
    assert realised["up"][0] == pytest.approx(0.35, abs=0.03)
    assert realised["q"][0] == pytest.approx(0, abs=0.01)
    save_checkpoint(model, None, tmp_path / "saved")
    assert torch.equal(load_model(tmp_path / "saved", dtype)(IDS).logits, model(IDS).logits)


def test_a_model_whose_configuration_names_no_activation_gets_no_centre() -> None:
    found = found_by(Scap(), families.family("bloom"), drawn_windows())
    assert not found.tensors
    assert found.notes[1:] == ("no centres: no key of the config.json says which activation the model has",)
    with pytest.raises(UserError, match=r"no key of its config.json decides the MLP's activation"):
        sparsify(families.family("bloom"), Scap(centre="mode"), drawn_windows())


def test_a_relufied_down_keeps_its_zeros_and_a_relu_on_the_input_is_refused() -> None:
    windows = drawn_windows()
    model = sparsify(families.family("llama"), Relufication())
    zeros = measure_sparsity(model, windows).sparsity["down"]
    sparsify(model, Scap(sparsity_down=0.7), windows)
    realised = measure_sparsity(model, windows).sparsity["down"]
    assert 0.4 < zeros[0] < 0.6 < realised[0] < 0.8
    with pytest.raises(UserError, match="scap masks the MLP's input, where layer 0 has relu already"):
        sparsify(sparsify(families.family("llama"), Relufication(stage=2)), Scap(), windows)


def test_an_input_with_enough_zeros_of_its_own_gets_no_mask() -> None:
    relufied = sparsify(families.family("llama"), Relufication())
    found = found_by(Scap(sparsity_down=0.3, centre="zero"), relufied, drawn_windows())
    assert places(found) == [(("gate", "up"), (0,)), (("gate", "up"), (1,))]


def test_short_texts_are_refused() -> None:
    with pytest.raises(UserError, match="scap needs 512 or more"):
        sparsify(families.family("llama"), Scap(), drawn_windows()[:3])


PEAKS = {
    "normal": (lambda z: 0.3 * z - 2, -2.0, -2.0, 0.03),
    "far": (lambda z: z + 50, 50.0, 50.0, 0.2),
    "lognormal": (lambda z: torch.exp(z / 2), 0.7788, 1.0, 0.05),
    "peaked": (lambda z: z**3, 0.0, 0.0, 1e-3),
    "two": (lambda z: torch.where(z > 0.6, 2 + 0.1 * z, z - 3), 2.08, -3.0, 0.5),
}


@pytest.mark.parametrize("name", PEAKS)
def test_modes_and_medians(name: str) -> None:
    make, mode, median, tolerance = PEAKS[name]
    values = make(torch.randn(200_000, generator=torch.Generator().manual_seed(0)))
    sketch = Sketch()
    sketch.add(values)
    assert sketch.mode() == pytest.approx(mode, abs=tolerance)
    assert sketch.median() == pytest.approx(float(values.median()), rel=0.004)
    assert sketch.median() == pytest.approx(median, abs=tolerance)


@pytest.mark.parametrize("value", [0.0, -0.0, 3.3, -1e-30])
def test_the_mode_and_the_median_of_one_value(value: float) -> None:
    sketch = Sketch()
    sketch.add(torch.full((100,), value))
    for found in (sketch.mode(), sketch.median()):
        assert found == pytest.approx(value, rel=2**-7, abs=0)


def test_a_share_that_is_zero_already_has_the_threshold_0() -> None:
    sketch = Sketch()
    sketch.add(torch.tensor([0.0, -0.0, 1.0, 2.0]))
    assert sketch.quantile(0.5) == 0
    assert 1 <= sketch.quantile(0.51) < 1.01
    assert sketch.median() == 0
