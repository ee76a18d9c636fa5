"""The penalty is what the formula says, however the model is run; its strength follows schedule or target."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import families
from relufy.errors import UserError
from relufy.methods.sparsify import sparsify
from relufy.model.structure import find_blocks
from relufy.recipe import Penalty
from relufy.train.penalty import NeuronPenalty, schedule

IDS = torch.tensor([[3, 4, 5, 50, 7], [0, 1, 2, 9, 9], [8, 8, 30, 31, 32]])
PROSPARSE_7B = Penalty(
    strength=(0.0, 5e-3, 5e-2, 5e-2, 2e-1, 2e-1), until=(5000, 6000, 10000, 12000, 16000, 16500)
)


def relufied(name: str = "llama") -> nn.Module:
    model = families.family(name)
    if name not in families.NATIVELY_SPARSE:
        sparsify(model, "relufy-stage1")
    return model.train()


def naive_term(model: nn.Module, ids: torch.Tensor, over_neurons: str = "mean") -> torch.Tensor:
    """Return the term by keeping what every down projection reads."""
    kept: list[torch.Tensor] = []
    blocks = find_blocks(model)
    handles = [
        block.down.module.register_forward_pre_hook(lambda _m, args: kept.append(args[0])) for block in blocks
    ]
    torch.manual_seed(0)  # for families with dropout
    model(ids)
    for handle in handles:
        handle.remove()
    rows = [values.flatten(0, -2).float().abs() for values in kept]
    per_token = [row.mean(-1) if over_neurons == "mean" else row.sum(-1) for row in rows]
    return torch.stack([tokens.mean() for tokens in per_token]).sum()


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def backward(model: nn.Module, penalty: NeuronPenalty) -> torch.Tensor:
    """Run the loss with the penalty backward; return the term."""
    torch.manual_seed(0)
    with penalty.attached():
        loss = model(IDS).logits.float().square().mean()
        term = penalty.term()
        (loss + 0.7 * term).backward()
    return term.detach()


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (5000, 0.0),
        (5500, 0.0025),
        (6000, 0.005),
        (7000, 0.01159),
        (8000, 0.0275),
        (9000, 0.04341),
        (11000, 0.05),
        (14000, 0.125),
        (16000, 0.2),
        (16500, 0.2),
    ],
)
def test_the_schedule_of_the_paper(step: int, expected: float) -> None:
    assert schedule(PROSPARSE_7B, step, 16500) == pytest.approx(expected, abs=5e-6)
    assert schedule(PROSPARSE_7B, step / 100, 165) == pytest.approx(expected, abs=5e-6)


def test_a_single_stage_is_constant() -> None:
    assert [schedule(Penalty(strength=(0.3,)), step, 10) for step in (0, 5, 10)] == [0.3] * 3


def test_the_strength_is_the_schedules() -> None:
    penalty = NeuronPenalty(relufied(), PROSPARSE_7B, 33)
    for step in range(33):
        assert penalty.strength().item() == pytest.approx(schedule(PROSPARSE_7B, step, 33))
        penalty.after_step(step + 1)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_the_term_is_the_formula(name: str) -> None:
    model = relufied(name) if name in (*families.STAGE_2, "nemotron") else families.family(name).train()
    assert backward(model, NeuronPenalty(model, Penalty(), 1)).item() == pytest.approx(
        naive_term(model, IDS).item(), rel=1e-5
    )


def test_over_neurons_sum_is_a_width_times_the_mean() -> None:
    model = relufied()
    penalty = NeuronPenalty(model, Penalty(over_neurons="sum"), 1)
    with penalty.attached():
        model(IDS)
    assert penalty.term().item() == pytest.approx(43 * naive_term(model, IDS).item(), rel=1e-5)


def test_the_gradient_is_that_of_the_formula() -> None:
    model, expected = relufied(), relufied()
    backward(model, NeuronPenalty(model, Penalty(), 1))
    (expected(IDS).logits.float().square().mean() + 0.7 * naive_term(expected, IDS)).backward()
    assert torch.allclose(gradients(model), gradients(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3"])
@pytest.mark.parametrize("target", [None, 0.9])
def test_gradient_checkpointing_changes_nothing(name: str, target: float | None) -> None:
    whole, again = relufied(name), relufied(name)
    again.gradient_checkpointing_enable()
    penalties = [NeuronPenalty(model, Penalty(target=target), 4) for model in (whole, again)]
    terms = [backward(model, penalty) for model, penalty in zip((whole, again), penalties, strict=True)]
    assert torch.equal(*terms)
    assert torch.equal(gradients(whole), gradients(again))
    for penalty in penalties:
        penalty.after_step(1)
        with pytest.raises(RuntimeError, match="no forward pass"):
            penalty.term()
    assert penalties[0].state() == penalties[1].state()


def test_checkpointing_that_hides_the_graph_is_refused() -> None:
    model = relufied()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UserError, match="use_reentrant"):
        backward(model, NeuronPenalty(model, Penalty(), 1))


@pytest.mark.parametrize("finds_first", [True, False])
def test_adapters_change_nothing_before_they_learn(finds_first: bool) -> None:
    model = relufied()
    expected = naive_term(model, IDS)
    penalty = NeuronPenalty(model, Penalty(), 1) if finds_first else None
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2)).train()
    penalty = penalty or NeuronPenalty(adapted, Penalty(), 1)
    term = backward(adapted, penalty)
    assert term.item() == pytest.approx(expected.item(), rel=1e-5)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.parameters())


def test_bf16_arithmetic_sums_in_float32() -> None:
    model = relufied()
    exact = naive_term(model, IDS)
    penalty = NeuronPenalty(model, Penalty(), 1)
    with torch.autocast("cpu", torch.bfloat16):
        term = backward(model, penalty)
    assert term.dtype == torch.float32
    assert term.item() == pytest.approx(exact.item(), rel=2e-2)
    assert torch.isfinite(gradients(model)).all()


def test_only_training_is_looked_at() -> None:
    model = relufied()
    penalty = NeuronPenalty(model, Penalty(), 1)
    with penalty.attached():
        model(IDS)
        with torch.no_grad():
            model(IDS + 1)
        model.eval()
        model(IDS + 2)
        model.train()
    assert penalty.term().item() == pytest.approx(naive_term(model, IDS).item(), rel=1e-6)
    with pytest.raises(RuntimeError, match="no forward pass"):
        penalty.term()


def test_a_term_is_of_the_last_forward_pass() -> None:
    model = relufied()
    penalty = NeuronPenalty(model, Penalty(), 1)
    with penalty.attached():
        with pytest.raises(IndexError):
            model(torch.tensor([[53]]))
        model(IDS)
        model(IDS[:1])
    assert penalty.term().item() == pytest.approx(naive_term(model, IDS[:1]).item(), rel=1e-6)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def steer(model: nn.Module, penalty: NeuronPenalty, first: int, last: int) -> list[float]:
    """Train on the penalty and a pull back to the weights of the start; return the strengths."""
    torch.manual_seed(first)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    strengths = []
    with penalty.attached():
        for step in range(first, last):
            for part in (IDS[:2], IDS[2:]):
                loss = model(part).logits.square().mean()
                (loss + penalty.strength() * penalty.term()).backward()
            strengths.append(penalty.strength().item())
            optimizer.step()
            optimizer.zero_grad()
            penalty.after_step(step + 1)
    return strengths


def test_a_resumed_controller_is_an_unbroken_one() -> None:
    settings = Penalty(strength=(0.0, 1.0), until=(0.2, 1.0), target=0.9)
    model = relufied()
    whole = NeuronPenalty(model, settings, 12)
    steer(model, whole, 0, 5)
    half, state = {k: v.clone() for k, v in model.state_dict().items()}, whole.state()
    expected = steer(model, whole, 5, 12)
    model.load_state_dict(half)
    resumed = NeuronPenalty(model, settings, 12)
    resumed.load_state(state)
    assert steer(model, resumed, 5, 12) == expected
    assert resumed.state() == whole.state()


def test_the_controller_begins_with_the_way() -> None:
    settings = Penalty(strength=(0.0, 1.0), until=(0.5, 1.0), target=0.9)
    model = relufied()
    penalty = NeuronPenalty(model, settings, 10)
    assert steer(model, penalty, 0, 6) == [0.0] * 6
    assert penalty.metrics()["target_sparsity"] == 0.9
    with penalty.attached():
        model(IDS)
    assert (penalty.strength() * penalty.term()).item() == pytest.approx(0.03, rel=0.05)


def test_parts_of_a_step_are_averaged() -> None:
    """The density of a step in two equal parts is that of the step."""
    model = relufied()
    found = []
    for parts in ([IDS[:2]], [IDS[:1], IDS[1:2]]):
        penalty = NeuronPenalty(model, Penalty(target=0.9), 10)
        with penalty.attached():
            for part in parts:
                model(part)
                penalty.term()
        penalty.after_step(1)
        found.append(penalty.state())
    assert found[0] == pytest.approx(found[1], rel=1e-5)


class Plant:
    """A stand-in for training: log density follows log strength, late, the later the lower the rate."""

    def __init__(self, noise: float = 0.02) -> None:
        self.log_density = math.log(0.4)
        self.generator = torch.Generator().manual_seed(0)
        self.noise = noise

    def step(self, strength: float, share: float, steps: int) -> torch.Tensor:
        settled = math.log(0.4) - 1.76 * (strength * 20) ** 0.3 / 3
        self.log_density += 25 / steps * (1 - share) * (settled - self.log_density)
        shaken = self.log_density + self.noise * torch.randn((), generator=self.generator)
        return torch.as_tensor(shaken).exp()


@pytest.mark.parametrize("steps", [150, 1000, 5000])
@pytest.mark.parametrize("target", [0.7, 0.8, 0.9])
def test_the_controller_reaches_its_target(steps: int, target: float) -> None:
    from relufy.train.controller import DensityController

    settings = Penalty(strength=(0.0, 1.0, 1.0), until=(0.05, 0.7, 1.0), target=target)
    controller, plant = DensityController(target, steps), Plant()
    density = torch.tensor(0.4)
    for step in range(steps):
        strength = controller.strength()
        density = plant.step(0.0 if strength is None else strength.item(), step / steps, steps)
        controller.look(density, 3 * density, schedule(settings, step + 1, steps))
    assert math.exp(plant.log_density) == pytest.approx(1 - target, abs=0.02)
