"""The configuration says which activation a model has, under the family's own key."""

import pytest
import torch

import families
from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.errors import UserError
from relufy.model.configuration import Pointer, find_activation_key, sparsity_of, write_sparsity
from relufy.model.sites import find_sites

KEYS = {
    "llama": "hidden_act",
    "gemma": "hidden_act",
    "gemma2": "hidden_activation",
    "gemma3": "hidden_activation",
    "phi": "hidden_act",
    "opt": "activation_function",
    "gpt2": "activation_function",
    "falcon": "activation",
    "starcoder2": "hidden_act",
}
NEURON = Sparsifier(("neuron",), "relu")
QKV = Sparsifier(("q", "k", "v"), "relu")


@pytest.mark.parametrize("name", KEYS)
def test_the_familys_own_key_is_found(name: str) -> None:
    model = families.family(name)
    activations = [block.activation.name for block in find_sites(model)]
    assert find_activation_key(model, activations) == KEYS[name]


def test_a_key_that_decides_more_than_the_mlp_is_not_taken() -> None:
    model = families.family("llama")
    (first, _) = [block.activation.name for block in find_sites(model)]
    with pytest.raises(UserError, match="tried hidden_act"):
        find_activation_key(model, [first])


@pytest.mark.parametrize(
    ("sparsifiers", "activation"),
    [
        ((NEURON,), "relu"),
        ((Sparsifier(("neuron",), "relu2"),), "relu2"),
        ((Sparsifier(("neuron",), "relu", 0.5),), "relufy"),
        ((NEURON, QKV), "relufy"),
        ((Sparsifier(("neuron", "q", "k", "v"), "relu"),), "relufy"),
    ],
    ids=["stage1", "squared", "shifted", "stage2", "stage2_in_one"],
)
def test_only_what_stock_transformers_computes_gets_a_stock_name(
    sparsifiers: tuple[Sparsifier, ...], activation: str
) -> None:
    model = families.family("llama")
    write_sparsity(model, ActivationSparsity(sparsifiers), "hidden_act")
    assert model.config.hidden_act == activation
    assert sparsity_of(model) == ActivationSparsity(sparsifiers)
    assert model.config.to_dict()["quantization_config"] == {"quant_method": "relufy", "version": 1}


@pytest.mark.parametrize(("name", "function"), [("llama", None), ("opt", "relu"), ("nemotron", "relu2")])
def test_native_sparsity_is_read_from_the_activation(name: str, function: str | None) -> None:
    found = sparsity_of(families.family(name)).at("neuron", 0)
    assert (found and found.function) == function


def test_a_pointer_of_another_version_is_refused() -> None:
    with pytest.raises(UserError, match=r"version 2 .* upgrade"):
        Pointer.from_dict({"quant_method": "relufy", "version": 2})


def test_trying_keys_leaves_the_random_state_alone() -> None:
    model = families.family("llama")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    find_activation_key(model, [block.activation.name for block in find_sites(model)])
    assert torch.equal(torch.rand(3), expected)
