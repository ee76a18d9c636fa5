"""LoRA: what was trained beside the weights becomes part of them, exactly, and leaves nothing else behind."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from families import STAGE_2, family
from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.errors import UserError
from relufy.method import Relufication, Teal
from relufy.methods.sparsify import sparsify
from relufy.model.checkpoint import load_model, save_checkpoint
from relufy.model.sparsifiers import apply_sparsity
from relufy.model.structure import find_blocks
from relufy.recipe import Finetune, Lora, Recipe
from relufy.train.adapters import adapted
from relufy.train.finetune import finetune

SETTINGS = Finetune(
    steps=4, batch_size=4, window=8, learning_rate=3e-2, warmup_steps=1, distill=1.0, lora=Lora(rank=3)
)
IDS = torch.tensor([[3, 4, 5, 50, 7], [0, 1, 2, 9, 9]])


def text() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 53, (16, 8))


def relufied(name: str, stage: int):
    return sparsify(family(name), Relufication(stage=stage))


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def attributes(model) -> dict[str, list[str]]:
    return {name: sorted(vars(module)) for name, module in model.named_modules()}


def disturb(adapters) -> None:
    """Give the adapters values as if they had been trained."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapters.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", [*STAGE_2, "gpt2"])
@pytest.mark.filterwarnings("ignore:the model has these sparsifiers already")
def test_merging_changes_no_logit(name: str, stage: int) -> None:
    if stage == 2 and name not in STAGE_2:
        pytest.skip("has no stage 2")
    model = relufied(name, stage)
    before, known, opened = state(model), attributes(model), model(IDS).logits
    with adapted(model, Lora(rank=3)) as adapters:
        disturb(adapters)
        expected = adapters(IDS).logits
    assert (expected - opened).abs().max() > 0.1
    assert torch.allclose(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    changed = {key for key, tensor in state(model).items() if not torch.equal(tensor, before[key])}
    projections = [p.name for block in find_blocks(model) for p in block.projections().values()]
    assert changed == {f"{name}.weight" for name in projections}
    assert attributes(model) == known


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_an_error_leaves_the_model_as_it_was(name: str) -> None:
    model = relufied(name, 1)
    model.lm_head.weight.requires_grad_(False)
    before, known = state(model), attributes(model)
    trains = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ZeroDivisionError), adapted(model, Lora()) as adapters:
        disturb(adapters)
        raise ZeroDivisionError
    assert {name: tensor.tolist() for name, tensor in state(model).items()} == {
        name: tensor.tolist() for name, tensor in before.items()
    }
    assert attributes(model) == known
    assert [parameter.requires_grad for parameter in model.parameters()] == trains


def test_training_trains_the_adapters_alone_and_the_model_can_be_saved(tmp_path: Path) -> None:
    teacher, model = family("llama"), relufied("llama", 2)
    before = state(model)
    done = finetune(model, SETTINGS, text(), teacher=teacher)
    assert done.losses[-1] < done.losses[0]
    changed = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.endswith("_proj.weight") for name in changed)
    save_checkpoint(model, None, tmp_path / "out")
    assert torch.equal(load_model(tmp_path / "out")(IDS).logits, model(IDS).logits)


def test_targets_are_chosen_by_name() -> None:
    model = relufied("llama", 1)
    before = state(model)
    with adapted(model, Lora(targets=("q_proj", "v_proj"))) as adapters:
        disturb(adapters)
    changed = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
    assert {name.rpartition("_proj")[0][-1] for name in changed} == {"q", "v"}
    with pytest.raises(UserError, match="LoRA: Target modules"), adapted(model, Lora(targets=("nothing",))):
        pass
    finetune(model, replace(SETTINGS, distill=0.0), text())


def test_the_seed_decides_where_adapters_begin() -> None:
    def trained(seed: int, draws: int) -> tuple[float, ...]:
        torch.rand(draws)
        model, settings = relufied("llama", 1), replace(SETTINGS, seed=seed)
        return finetune(model, settings, text(), teacher=family("llama")).losses

    assert trained(0, 1) == trained(0, 5) != trained(1, 1)


def teal(model):
    windows = np.random.default_rng(0).integers(3, 53, (80, 9))
    return sparsify(model, Recipe("teal", sparsify=Teal(sparsity=0.5)), windows)


def drelu(model):
    return apply_sparsity(model, ActivationSparsity((Sparsifier(("neuron",), "drelu"),)))


@pytest.mark.parametrize("make", [teal, drelu])
def test_a_projection_with_zeros_of_its_own_gets_no_adapter(make: Callable) -> None:
    model = make(family("llama"))
    before = state(copy.deepcopy(model))
    with pytest.raises(UserError, match="has a sparsifier of its own"):
        finetune(model, replace(SETTINGS, distill=0.0), text())
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())
