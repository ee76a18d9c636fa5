"""Optimizers: who takes which parameter, one object for two of them, exact states, schedules by number."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

from families import FAMILIES, family
from relufy.errors import UserError
from relufy.recipe import Finetune
from relufy.train.optimizers import (
    ADAM_BETAS,
    MuonWithAdamW,
    hidden_matrices,
    make_optimizer,
    schedule_arguments,
    split_parameters,
)

MUON = Finetune(steps=8, learning_rate=1e-2, optimizer="muon", weight_decay=0.1)
ADAMW = replace(MUON, optimizer="adamw")


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def in_groups(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@pytest.mark.parametrize("settings", [MUON, ADAMW], ids=["muon", "adamw"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_trainable_parameter_is_in_one_group(name: str, settings: Finetune) -> None:
    model = family(name)
    next(model.parameters()).requires_grad_(False)
    found = in_groups(make_optimizer(model, settings))
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(found) == len(trainable) and {id(p) for p in found} == trainable


@pytest.mark.parametrize("name", FAMILIES)
def test_muon_takes_the_matrices_of_the_blocks(name: str) -> None:
    model = family(name)
    names = {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)] for p in hidden_matrices(model)}
    outside = ("embed", "wte", "wpe", "lm_head", "norm", "bias")
    assert found and not any(word in name.lower() for name in found for word in outside)
    assert all(model.get_parameter(name).ndim == 2 for name in found)
    blocks = {n for n, p in model.named_parameters() if ".0." in n and p.ndim == 2 and "norm" not in n}
    assert {n for n in found if ".0." in n} == blocks


def test_weight_decay_is_for_matrices_alone() -> None:
    model = family("gpt2")
    matrices, others = split_parameters(model)
    assert {p.ndim for p in matrices} == {2} and {p.ndim for p in others} == {1}
    for settings in (MUON, ADAMW):
        decay = {
            id(p): g["weight_decay"]
            for g in make_optimizer(model, settings).param_groups
            for p in g["params"]
        }
        assert {decay[id(p)] for p in matrices} == {0.1} and {decay[id(p)] for p in others} == {0.0}


def test_both_take_the_steps_that_they_take_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")  # nothing is widened
    model = family("llama")
    twin = copy.deepcopy(model)
    both = make_optimizer(model, replace(MUON, weight_decay=0.0))
    hidden = hidden_matrices(twin)
    known = {id(p) for p in hidden}
    muon = torch.optim.Muon(
        hidden, lr=1e-2, weight_decay=0.0, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(
        [p for p in twin.parameters() if id(p) not in known], lr=1e-2, betas=ADAM_BETAS, weight_decay=0.0
    )
    for step in range(3):
        gradients(model, step)
        gradients(twin, step)
        both.step()
        muon.step()
        adamw.step()
    assert torch.equal(weights(model), weights(twin))


@pytest.mark.parametrize(("capability", "is_exact"), [("AVX2", True), ("AVX512", False)])
def test_muon_multiplies_float32_where_a_processor_has_no_bfloat16(
    capability: str, is_exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    generator = torch.Generator().manual_seed(0)
    matrix = nn.Parameter(torch.zeros(24, 40))
    matrix.grad = torch.randn(24, 40, generator=generator)
    x = matrix.grad.double()
    x = x / x.norm()  # the scale of momentum is of no matter
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    MuonWithAdamW([matrix], [{"params": [nn.Parameter(torch.zeros(1))]}], 1.0, 0.0).step()
    expected = -0.2 * 40**0.5 * x
    error = ((matrix.double() - expected).norm() / expected.norm()).item()
    assert (error < 1e-5) == is_exact and error < 0.02


def test_updates_of_both_have_the_same_size() -> None:
    model = family("llama")
    before = copy.deepcopy(model)
    optimizer = make_optimizer(model, replace(MUON, weight_decay=0.0))
    gradients(model, 0)
    optimizer.step()
    for parameter, old in zip(hidden_matrices(model), hidden_matrices(before), strict=True):
        assert (parameter - old).detach().square().mean().sqrt().item() == pytest.approx(0.2 * 1e-2, rel=0.25)


def test_a_scheduler_moves_the_rate_of_both() -> None:
    model = family("llama")
    optimizer = make_optimizer(model, MUON)
    scheduler = LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    gradients(model, 0)
    optimizer.step()
    scheduler.step()
    moved = weights(model)
    optimizer.step()
    assert torch.equal(weights(model), moved)


@pytest.mark.parametrize("settings", [MUON, ADAMW], ids=["muon", "adamw"])
def test_a_state_that_was_saved_goes_on_as_if_never_saved(settings: Finetune) -> None:
    model = family("llama")
    optimizer = make_optimizer(model, settings)
    for step in range(2):
        gradients(model, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    resumed = copy.deepcopy(model)
    other = make_optimizer(resumed, replace(settings, learning_rate=1.0))
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for step in range(2, 4):
        for one, its in ((model, optimizer), (resumed, other)):
            gradients(one, step)
            its.step()
    assert torch.equal(weights(model), weights(resumed))


def test_gradients_are_cleared_and_a_closure_is_called() -> None:
    model = family("llama")
    optimizer = make_optimizer(model, MUON)
    gradients(model, 0)
    assert optimizer.step(lambda: 3.0) == 3.0
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_accelerate_wraps_it() -> None:
    from accelerate import Accelerator

    model = family("llama")
    twin = copy.deepcopy(model)
    plain, wrapped = make_optimizer(twin, MUON), Accelerator(cpu=True).prepare(make_optimizer(model, MUON))
    for step in range(2):
        for one, its in ((twin, plain), (model, wrapped)):
            gradients(one, step)
            its.step()
    assert isinstance(wrapped.optimizer, MuonWithAdamW) and torch.equal(weights(model), weights(twin))


@pytest.mark.parametrize("settings", [MUON, ADAMW], ids=["muon", "adamw"])
def test_adapters_alone(settings: Finetune) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(family("llama"), LoraConfig(r=2, target_modules="all-linear"))
    optimizer = make_optimizer(model, settings)
    assert len(in_groups(optimizer)) == 2 * 7 * 2
    before = weights(model)
    gradients(model, 0)
    optimizer.step()
    assert not torch.equal(weights(model), before)


def test_muon_is_refused_where_no_block_is_found() -> None:
    with pytest.raises(UserError, match="set optimizer to adamw"):
        make_optimizer(nn.Sequential(nn.Linear(3, 3)), MUON)
    assert make_optimizer(nn.Sequential(nn.Linear(3, 3)), ADAMW).param_groups


RATES = {
    "linear": [0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6],
    "cosine": [0, 0.5, 1, 0.933, 0.75, 0.5, 0.25, 0.067],
    "constant": [0, 0.5, 1, 1, 1, 1, 1, 1],
    "wsd": [0, 0.5, 1, 1, 1, 0.75, 0.5, 0.25],
}
"""Of eight steps, two of them a warm-up; 45 % of eight are the four that the rate of wsd falls in."""


def rates(settings: Finetune, tmp_path) -> list[float]:
    """Return the rate of every step, by the way that the Trainer makes its schedule."""
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=settings.steps,
        **schedule_arguments(settings),
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        args.get_warmup_steps(settings.steps),
        settings.steps,
        args.lr_scheduler_kwargs,
    )
    found = []
    for _ in range(settings.steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("schedule", RATES)
def test_schedules(schedule: str, tmp_path) -> None:
    settings = Finetune(steps=8, warmup_steps=2, learning_rate=0.5, decay=0.45, schedule=schedule)  # type: ignore[arg-type]
    assert rates(settings, tmp_path) == pytest.approx([0.5 * r for r in RATES[schedule]], abs=1e-3)


def test_a_decay_has_at_most_the_steps_after_the_warmup(tmp_path) -> None:
    settings = Finetune(steps=4, warmup_steps=2, learning_rate=1.0, decay=1.0, schedule="wsd")
    assert rates(settings, tmp_path) == [0, 0.5, 1, 0.5]
