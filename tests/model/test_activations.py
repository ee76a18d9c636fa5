"""Every activation is its formula, forward and backward, alone and in a model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel

import families
from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.errors import UserError
from relufy.model.activations import FatReLU, HeLU, ReLU, SquaredReLU, StatisticalTopK
from relufy.model.configuration import sparsity_of
from relufy.model.sparsifiers import apply_sparsity

IDS = torch.tensor([[3, 4, 5, 50, 7], [0, 1, 2, 9, 9]])
floats = st.lists(st.floats(-10, 10, width=32), min_size=1)


@given(floats, st.floats(0, 3, width=32))
def test_fatrelu_keeps_what_is_at_least_the_threshold(values: list[float], threshold: float) -> None:
    x = torch.tensor([*values, threshold, -threshold])
    expected = torch.tensor([v if v >= threshold else 0.0 for v in x.tolist()])
    assert torch.equal(FatReLU(threshold)(x), expected)


@given(floats, st.floats(-1, 1, width=32))
def test_helu_is_relu_forward(values: list[float], shift: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.tensor(values, dtype=dtype)
        assert torch.equal(HeLU(shift)(x), ReLU(shift)(x))
        assert torch.equal(HeLU(0.0, width=1.5)(x), nn.functional.relu(x))


def gradients(module: nn.Module, values: list[float], dtype: torch.dtype = torch.float32) -> list[float]:
    """Return the gradient of the module's output at each value."""
    x = torch.tensor(values, dtype=dtype, requires_grad=True)
    module(x).backward(torch.ones_like(x))
    assert x.grad is not None
    return x.grad.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("width", [0.001, 0.05, 0.5, 2.0])
def test_helu_has_a_gradient_in_the_band_below_zero(width: float, dtype: torch.dtype) -> None:
    values = [-2 * width, -width / 2, 0.0, width]
    assert gradients(HeLU(width=width), values, dtype) == [0.0, 1.0, 1.0, 1.0]
    assert gradients(ReLU(), values, dtype) == [0.0, 0.0, 0.0, 1.0]
    assert gradients(HeLU(width=width), [-width * 1.01]) == [0.0]


def test_helu_of_no_width_is_relu() -> None:
    values = [-1.0, -1e-6, 0.0, 1e-6, 1.0]
    assert gradients(HeLU(width=0.0), values) == gradients(ReLU(), values)  # torch's convention at 0 is 0


def test_a_shift_moves_the_gradients_with_it() -> None:
    values = [0.3 - 0.2, 0.3 - 0.05, 0.3 + 0.1]
    assert gradients(HeLU(shift=0.3, width=0.1), values) == [0.0, 1.0, 1.0]
    assert gradients(ReLU(shift=0.3), values) == [0.0, 0.0, 1.0]
    assert gradients(SquaredReLU(shift=0.5), [0.25, 0.5, 1.5]) == [0.0, 0.0, 2.0]


@given(floats, st.floats(-1, 1, width=32))
def test_squared_relu_is_the_square_and_has_its_gradient(values: list[float], shift: float) -> None:
    x = torch.tensor(values)
    expected = (x - shift).clamp(min=0)
    assert torch.equal(SquaredReLU(shift)(x), expected**2)
    assert gradients(SquaredReLU(shift), values) == (2 * expected).tolist()


DRELU_GRADIENTS = {
    (2.0, 3.0): (3.0, 2.0),
    (2.0, -3.0): (0.0, 0.0),
    (-2.0, 3.0): (0.0, 0.0),
    (-2.0, -3.0): (0, 0),
}
"""Of relu(gate) * relu(up), to gate and up."""
GATE_ONLY_GRADIENTS = {
    (2.0, 3.0): (3.0, 2.0),
    (2.0, -3.0): (-3.0, 2.0),
    (-2.0, 3.0): (0, 0),
    (-2.0, -3.0): (0, 0),
}


@pytest.mark.parametrize(
    ("function", "table"), [("drelu", DRELU_GRADIENTS), ("relu", GATE_ONLY_GRADIENTS)], ids=["drelu", "relu"]
)
def test_gradients_of_gate_and_up_by_their_signs(function: str, table: dict) -> None:
    model = families.family("llama")
    apply_sparsity(model, ActivationSparsity((Sparsifier(("neuron",), function),)))
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        for projection in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            projection.weight.zero_()
        mlp.gate_proj.weight[0, 0] = mlp.up_proj.weight[0, 1] = mlp.down_proj.weight[0, 0] = 1.0
    for (gate, up), expected in table.items():
        x = torch.zeros(24)
        x[0], x[1] = gate, up
        x.requires_grad_()
        mlp(x)[0].backward()
        assert x.grad is not None
        assert tuple(x.grad[:2].tolist()) == expected


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.95])
def test_statistical_topk_is_its_formula(sparsity: float) -> None:
    x = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0))
    normal = torch.distributions.Normal(0.0, 1.0)
    cutoff = x.mean(-1, keepdim=True) + x.std(-1, correction=0, keepdim=True) * normal.icdf(
        torch.tensor(sparsity)
    )
    expected = nn.functional.silu((x - cutoff).clamp(min=0))
    actual = StatisticalTopK(sparsity, nn.SiLU())(x)
    torch.testing.assert_close(actual, expected)
    assert (actual == 0).float().mean().item() == pytest.approx(sparsity, abs=0.03)


def test_what_is_no_number_stays_so() -> None:
    x = torch.tensor([float("nan")])
    for module in (ReLU(), FatReLU(0.1), HeLU(), StatisticalTopK(0.5, nn.SiLU())):
        assert module(x).isnan().all()


def mlp_output(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return gate, up and down's input of layer 1, computed from the MLP's input and the weights."""
    seen: dict[str, torch.Tensor] = {}
    mlp = model.model.layers[1].mlp
    mlp.register_forward_pre_hook(lambda _m, args: seen.update(x=args[0]))
    mlp.down_proj.register_forward_pre_hook(lambda _m, args: seen.update(down=args[0]))
    model(IDS)
    return seen["x"] @ mlp.gate_proj.weight.T, seen["x"] @ mlp.up_proj.weight.T, seen["down"]


def test_drelu_rectifies_gate_and_up() -> None:
    model = families.family("llama")
    keys = list(model.state_dict())
    apply_sparsity(model, ActivationSparsity((Sparsifier(("neuron",), "drelu"),)))
    gate, up, down = mlp_output(model)
    torch.testing.assert_close(down, gate.clamp(min=0) * up.clamp(min=0))
    assert (down == 0).float().mean() > 0.6
    assert list(model.state_dict()) == keys


def test_statistical_topk_wraps_the_models_own_activation() -> None:
    model = families.family("gemma")
    neuron = Sparsifier(("neuron",), "statistical_topk", sparsity=0.7, layers=(1,))
    apply_sparsity(model, ActivationSparsity((neuron,)))
    gate, up, down = mlp_output(model)
    cutoff = gate.mean(-1, keepdim=True) + gate.std(-1, correction=0, keepdim=True) * 0.5244005
    act = nn.functional.gelu((gate - cutoff).clamp(min=0), approximate="tanh")
    torch.testing.assert_close(down, act * up)
    assert model.config.hidden_act == "relufy"
    assert sparsity_of(model).activation == "gelu_pytorch_tanh"


REFUSED = {
    "drelu_plain": ("gpt2", Sparsifier(("neuron",), "drelu"), "in a plain MLP drelu is relu"),
    "drelu_fused": ("phi3", Sparsifier(("neuron",), "drelu"), "one projection makes gate and up"),
    "back_to_dense": ("opt", Sparsifier(("q",), "topk", k=3), "already has relu .* would become dense"),
    "less_fat": ("opt", Sparsifier(("neuron",), "relu2"), "already has relu .* would become relu2"),
    "selection": ("opt", Sparsifier(("neuron",), "topk", k=3), "already has relu .* would become topk"),
    "some_layers": (
        "llama",
        Sparsifier(("neuron",), "fatrelu", threshold=0.1, layers=(0,)),
        "in every layer",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_unchanged(case: str) -> None:
    name, sparsifier, message = REFUSED[case]
    model = families.family(name)
    before, config = model(IDS).logits, model.config.to_dict()
    with pytest.raises(UserError, match=message):
        apply_sparsity(model, ActivationSparsity((sparsifier,)))
    assert torch.equal(model(IDS).logits, before)
    assert model.config.to_dict() == config


@pytest.mark.parametrize(
    "sparsifier",
    [
        Sparsifier(("neuron",), "fatrelu", threshold=0.0),
        Sparsifier(("neuron",), "helu"),
        Sparsifier(("neuron",), "relu"),
    ],
    ids=lambda s: s.function,
)
def test_a_relu_model_may_get_functions_with_its_zeros(sparsifier: Sparsifier) -> None:
    model = families.family("llama")
    apply_sparsity(model, ActivationSparsity((Sparsifier(("neuron",), "helu"),)))
    before = model(IDS).logits
    assert model.config.hidden_act == "relu"
    apply_sparsity(model, ActivationSparsity((sparsifier,)))
    assert torch.equal(model(IDS).logits, before)
    assert model.config.hidden_act == ("relufy" if sparsifier.function == "fatrelu" else "relu")


def test_statistical_topk_of_an_activation_without_zeros_is_refused() -> None:
    model = families.family("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Sigmoid()
    neuron = Sparsifier(("neuron",), "statistical_topk", sparsity=0.5)
    with pytest.raises(UserError, match="Sigmoid of 0 is not 0"):
        apply_sparsity(model, ActivationSparsity((neuron,)))
