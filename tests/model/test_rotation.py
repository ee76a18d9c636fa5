"""Selections in a rotated basis: what they compute, what counts as zero there, what they do not go with."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import families
from relufy.activation_sparsity import ActivationSparsity, Sparsifier, read_activation_sparsity
from relufy.errors import UserError
from relufy.model.observe import observe_sites
from relufy.model.selections import Selection, TokenPositions, greatest
from relufy.model.sites import find_sites
from relufy.model.sparsifiers import apply_sparsity, sparsity_tensors

torch.set_num_threads(1)

IDS = torch.tensor([[3, 4, 5, 50, 7], [0, 1, 2, 9, 9]])


def turned(width: int = 24, seed: int = 0) -> torch.Tensor:
    """Return a random rotation."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator)).Q.float()


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 24, generator=torch.Generator().manual_seed(1))


def selection(**values: Any) -> Selection:
    values = {"function": "topk", "k": 7} | values
    return Selection(Sparsifier(("q",), rotation=True, **values), {"rotation": turned()}, TokenPositions())


def rotated(name: str, sparsifiers: Sequence[Sparsifier]) -> PreTrainedModel:
    model, sparsity = families.family(name), ActivationSparsity(tuple(sparsifiers))
    shapes = sparsity_tensors(find_sites(model), sparsity)
    tensors = {n: turned() if n.endswith("rotation") else torch.full(s, 0.3) for n, s in shapes.items()}  # type: ignore[arg-type]
    return apply_sparsity(model, sparsity, tensors)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 1)])
def test_it_is_the_formula(shape: tuple[int, ...]) -> None:
    x = inputs(*shape)
    y = x.double() @ turned().double()
    expected = torch.where(greatest(y.abs(), 7), y, 0) @ turned().double().T
    torch.testing.assert_close(selection()(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal((selection().rotated(x) != 0).sum(-1), torch.full(shape, 7))


def test_a_threshold_is_compared_in_the_basis() -> None:
    x = inputs(40)
    y = x @ turned()
    found = selection(function="threshold", k=None, threshold=0.6).rotated(x)
    assert torch.equal(found, torch.where(y.abs() >= 0.6, y, 0))


@pytest.mark.parametrize("change", [{"k": 24}, {"function": "threshold", "k": None, "threshold": 0.0}])
def test_keeping_everything_is_exact_to_rounding(change: dict[str, Any]) -> None:
    torch.testing.assert_close(selection(**change)(inputs(3, 9)), inputs(3, 9), rtol=0, atol=1e-5)


def test_half_precision_is_rotated_in_float32() -> None:
    x = inputs(50).bfloat16()
    found = selection()(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, selection()(x.float()).bfloat16())


def test_dense_tokens_pass_bit_for_bit() -> None:
    sparsifier = Sparsifier(("q", "k", "v"), "topk", k=3, rotation=True, dense_first_tokens=2)
    model, dense = rotated("llama", [sparsifier]), families.family("llama")
    assert torch.equal(model(IDS[:, :2]).logits, dense(IDS[:, :2]).logits)
    assert not torch.allclose(model(IDS).logits[:, 2:], dense(IDS).logits[:, 2:])
    decoding = Sparsifier(("q", "k", "v"), "topk", k=3, rotation=True, phase="decode")
    model = rotated("llama", [decoding])
    prompt = model(IDS[:, :4], use_cache=True)
    assert torch.equal(prompt.logits, dense(IDS[:, :4]).logits)
    after = model(IDS[:, 4:], past_key_values=prompt.past_key_values).logits
    assert not torch.allclose(after, dense(IDS).logits[:, 4:])


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_zeros_are_counted_in_the_basis(name: str) -> None:
    sites = ("gate", "up") if name in families.GATED else ("up",)
    masks = [Sparsifier(s, "topk", k=6, rotation=True) for s in (("q", "k", "v"), sites)]
    model = rotated(name, masks)
    with observe_sites(model) as observer:
        model(IDS)
    for site in ("q", "k", "v", *sites):
        assert observer.sparsity()[site] == [18 / 24, 18 / 24]
    assert observer.sparsity()["o"] == [0.0, 0.0]


def test_zeros_of_masks_without_a_norm_are_counted_in_the_basis() -> None:
    model = rotated(
        "olmo2", [Sparsifier((s,), "topk", k=6, rotation=True) for s in ("q", "k", "v", "gate", "up")]
    )
    with observe_sites(model) as observer:
        model(IDS)
    assert all(observer.sparsity()[site] == [0.75, 0.75] for site in ("q", "k", "v", "gate", "up"))


@pytest.mark.parametrize("name", ["falcon", "phi", "gptj"])
def test_parallel_readers_count_alike_also_with_a_centre_between_them(name: str) -> None:
    masks = [
        Sparsifier(("q", "k", "v", "up"), "topk", k=6, rotation=True),
        Sparsifier(("o",), "topk", k=10, per_channel=("centre",)),
    ]
    model = rotated(name, masks)
    with observe_sites(model) as observer:
        model(IDS)
    found = observer.sparsity()
    assert found["q"] == found["up"] == [0.75, 0.75]
    assert found["o"] == [14 / 24, 14 / 24]


REFUSED = {
    "o": ({"sites": ("o",)}, "a rotation needs the input of q, k, v, gate, up"),
    "down": ({"sites": ("up", "down")}, "a rotation needs the input of"),
    "neuron": ({"sites": ("neuron",)}, "a rotation needs the input of"),
    "weight": ({"per_channel": ("weight",)}, "without per_channel or correction"),
    "centre": ({"per_channel": ("centre",)}, "without per_channel or correction"),
    "correction": ({"correction": "low_rank"}, "without per_channel or correction"),
    "relu": ({"function": "relu", "k": None}, "rotation belongs to threshold, topk; relu has none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_rotation_does_not_go_with(case: str) -> None:
    change, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        Sparsifier(**({"sites": ("q",), "function": "topk", "k": 3, "rotation": True} | change))


def test_a_rotation_is_square_and_finite_and_there() -> None:
    model, sparsity = (
        families.family("llama"),
        ActivationSparsity((Sparsifier(("up",), "topk", k=3, rotation=True),)),
    )
    name = "model.layers.0.mlp.up_proj.sparsifier.rotation"
    with pytest.raises(UserError, match=f"2 tensors more, {name}"):
        apply_sparsity(model, sparsity)
    both = {name.replace("0", layer): turned() for layer in "01"}
    for wrong in (turned(23), turned()[:, :20], torch.full((24, 24), torch.nan), torch.eye(24).long()):
        with pytest.raises(UserError, match="rotation"):
            apply_sparsity(model, sparsity, both | {name: wrong})
    apply_sparsity(model, sparsity, both)


def test_the_block_comes_back_and_leaves_out_what_is_not_there() -> None:
    sparsity = ActivationSparsity(
        (Sparsifier(("q", "k", "v"), "topk", k=3, rotation=True), Sparsifier(("o",), "topk", k=3))
    )
    block = sparsity.to_block()
    assert block["sparsifiers"][0]["rotation"] is True and "rotation" not in block["sparsifiers"][1]
    assert read_activation_sparsity({"activation_sparsity": block}) == sparsity


def test_gradients_flow_through_what_is_kept() -> None:
    x = inputs(4).requires_grad_()
    selection()(x).square().sum().backward()
    expected = 2 * selection()(x.detach())
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)
