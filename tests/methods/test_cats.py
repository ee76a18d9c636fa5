"""CATS: the threshold is the quantile that the paper says, and nothing but the neurons changes."""

import numpy as np
import pytest
import torch
from tests.methods.written import bundled_model, drawn_windows, found_by, written_windows

import families
from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.errors import UserError
from relufy.measure.sparsity import measure_sparsity
from relufy.method import Calibration, Cats
from relufy.methods.sparsify import sparsify
from relufy.model.configuration import sparsity_of
from relufy.model.observe import observe_sites
from relufy.model.sites import find_sites
from relufy.model.sparsifiers import apply_sparsity
from relufy.recipe import Recipe

IDS = torch.tensor([[3, 4, 5, 50, 7], [0, 1, 2, 9, 9], [9, 8, 7, 6, 5]])
TINY = 1e-9
"""A share of less than one neuron."""


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_threshold_is_the_quantile_of_the_activations_magnitude(share: float) -> None:
    model, windows = families.family("llama"), drawn_windows()
    outputs: list[list[torch.Tensor]] = [[], []]
    for block, kept in zip(find_sites(model), outputs, strict=True):
        block.activation.module.register_forward_hook(lambda _m, _a, y, kept=kept: kept.append(y[:, 1:]))
    with torch.inference_mode():
        model(torch.from_numpy(windows))
    found = found_by(Cats(sparsity=share), families.family("llama"), windows)
    assert [(s.sites, s.function, s.layers) for s in found.sparsifiers] == [
        (("neuron",), "threshold", (layer,)) for layer in (0, 1)
    ]
    for sparsifier, kept in zip(found.sparsifiers, outputs, strict=True):
        magnitudes = torch.cat(kept).abs().flatten()
        assert sparsifier.threshold == pytest.approx(float(magnitudes.quantile(share)), rel=0.01)


def test_a_target_of_next_to_nothing_is_dense_bit_for_bit() -> None:
    dense, model = families.family("llama"), families.family("llama")
    sparsify(model, Cats(sparsity=TINY), drawn_windows())
    assert sparsity_of(model).sparsifiers
    assert torch.equal(model(IDS).logits, dense(IDS).logits)


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_held_out_text_is_as_sparse_as_asked_for(share: float) -> None:
    calibration, held_out = written_windows()
    model = sparsify(bundled_model(), Cats(sparsity=share), calibration)
    realised = measure_sparsity(model, held_out)
    assert np.abs(np.array(realised.sparsity["neuron"]) - share).max() < 0.02
    assert realised.sparsity["down"] == realised.sparsity["neuron"]
    assert realised.mean["gate"] == 0


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in families.GATED] + [(n, torch.bfloat16) for n in ("llama", "phi3")],
)
def test_every_gated_family(name: str, dtype: torch.dtype) -> None:
    windows = drawn_windows()
    model = sparsify(families.family(name, dtype), Cats(sparsity=0.5), windows)
    first = measure_sparsity(model, windows).sparsity["neuron"][0]
    assert first == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("batch", [1, 3, 24])
def test_the_batch_size_of_the_calibration_does_not_matter(batch: int) -> None:
    windows = drawn_windows()
    expected = found_by(Cats(), families.family("llama"), windows)
    recipe = Recipe(name="test", sparsify=Cats(), calibrate=Calibration(batch_size=batch))
    found = sparsity_of(sparsify(families.family("llama"), recipe, windows))
    for one, other in zip(found.sparsifiers, expected.sparsifiers, strict=True):
        assert one.threshold == pytest.approx(other.threshold, rel=1e-3)


def test_the_mask_of_a_token_does_not_depend_on_its_neighbours() -> None:
    model = sparsify(families.family("llama"), Cats(), drawn_windows())
    masks = []
    for ids in (IDS, IDS[:1]):
        with observe_sites(model) as observer, torch.inference_mode():
            model(ids)
        masks.append(observer.zeros()["neuron"])
        torch.testing.assert_close(model(ids).logits[0], model(IDS).logits[0])
    assert masks[0] > masks[1] > [0, 0]


def test_a_plain_mlp_is_refused() -> None:
    with pytest.raises(UserError, match="cats needs a gate, and GPT2LMHeadModel has a plain MLP"):
        sparsify(families.family("gpt2"), Cats(), drawn_windows())


@pytest.mark.parametrize(
    ("function", "hint"), [("relu", "fatrelu"), ("relu2", "teal or scap"), ("drelu", "teal or scap")]
)
def test_an_activation_with_zeros_is_refused(function: str, hint: str) -> None:
    model = families.family("llama")
    apply_sparsity(model, ActivationSparsity((Sparsifier(("neuron",), function),)))
    with pytest.raises(UserError, match=rf"layer 0 has {function} at 'neuron' already; {hint}"):
        sparsify(model, Cats(), drawn_windows())


def test_missing_and_short_texts_are_refused() -> None:
    model = families.family("llama")
    with pytest.raises(UserError, match="cats needs text to calibrate on"):
        sparsify(model, Cats())
    with pytest.raises(UserError, match="has 64 positions, cats needs 512 or more"):
        sparsify(model, Cats(), drawn_windows()[:2])
    with pytest.raises(UserError, match="sparsity must lie between 0 and 1"):
        Cats(sparsity=1.0)
    assert not sparsity_of(model).sparsifiers


def test_it_is_refused_twice() -> None:
    model = sparsify(families.family("llama"), Cats(), drawn_windows())
    with pytest.raises(UserError, match="has masks already"):
        sparsify(model, Cats(), drawn_windows())
    with pytest.raises(UserError, match="NaN or infinity"):
        broken = families.family("llama")
        broken.model.layers[0].mlp.gate_proj.weight.data[0, 0] = torch.nan
        sparsify(broken, Cats(), drawn_windows())
