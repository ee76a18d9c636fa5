"""What a model cannot select, and tensors that do not fit, are refused; the model stays as it was."""

from collections.abc import Callable

import pytest
import torch

import families
from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.errors import UserError
from relufy.model.selections import Selection
from relufy.model.sites import find_sites
from relufy.model.sparsifiers import apply_sparsity, sparsity_tensors

IDS = torch.tensor([[3, 4, 5, 50, 7], [0, 1, 2, 9, 9]])

REFUSED = {
    "k_too_great": ("llama", [Sparsifier(("q",), "topk", k=25)], "k is 25 at 'q', which has 24 entries"),
    "part_of_a_fused": ("gpt2", [Sparsifier(("q",), "topk", k=3)], "serves q k v, so they need the same"),
    "half_of_gate_up": ("phi3", [Sparsifier(("up",), "topk", k=3)], "serves gate up"),
    "no_norm": ("olmo2", [Sparsifier(("q", "k", "v"), "topk", k=3)], "cannot share a mask; give each"),
    "neuron_and_down": (
        "gpt2",
        [Sparsifier(("neuron", "down"), "topk", k=3)],
        "'neuron' and 'down' are one site",
    ),
    "relu_beside_selection": (
        "llama",
        [Sparsifier(("neuron",), "relu"), Sparsifier(("q",), "relu"), Sparsifier(("k", "v"), "topk", k=3)],
        "q k v read one norm's output",
    ),
    "tensors_missing": (
        "llama",
        [Sparsifier(("o",), "threshold", per_channel=("threshold",))],
        "need 2 tensors more, model.layers.0.self_attn.o_proj.sparsifier.threshold",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_unchanged(case: str) -> None:
    name, sparsifiers, message = REFUSED[case]
    model = families.family(name)
    before, config = model(IDS).logits, model.config.to_dict()
    with pytest.raises(UserError, match=message):
        apply_sparsity(model, ActivationSparsity(tuple(sparsifiers)))
    assert torch.equal(model(IDS).logits, before)
    assert model.config.to_dict() == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(nonsense=torch.ones(1)), "nonsense belongs to no sparsifier"),
        (lambda t: t.update({k: v[:-1] for k, v in t.items()}), r"should be floating-point \[24\]"),
        (lambda t: t.update({k: v.long() for k, v in t.items()}), "torch.int64"),
        (lambda t: t.update({k: v * torch.nan for k, v in t.items()}), "are no numbers"),
    ],
    ids=["unknown", "shape", "integers", "nan"],
)
def test_tensors_that_do_not_fit_are_refused(change: Callable[[dict], None], message: str) -> None:
    model = families.family("llama")
    sparsity = ActivationSparsity((Sparsifier(("q", "k", "v"), "topk", k=3, per_channel=("weight",)),))
    tensors = {name: torch.ones(24) for name in sparsity_tensors(find_sites(model), sparsity)}
    change(tensors)
    with pytest.raises(UserError, match=message):
        apply_sparsity(model, sparsity, tensors)
    assert not any(isinstance(module, Selection) for module in model.modules())
