"""Greedy sequential thresholds: the loss stays within its bound, and what costs nothing is taken."""

import numpy as np
import pytest
import torch

import families
from relufy.measure.quality import perplexity
from relufy.method import GreedySequential
from relufy.methods.sparsify import find, make_setting, sparsify
from relufy.model.configuration import sparsity_of
from relufy.recipe import Recipe

torch.set_num_threads(1)


def windows_of(count: int = 40, seed: int = 0) -> np.ndarray:
    windows = np.random.default_rng(seed).integers(3, 53, (count, 16))
    windows[:, 0] = 0
    return windows


@pytest.mark.parametrize("factor", [1.0002, 1.002])
def test_the_loss_stays_within_the_factor_of_the_accepted_steps(factor: float) -> None:
    method = GreedySequential(loss_increase=factor, step=0.2)
    model = families.family("llama")
    dense = perplexity(model, windows_of()).nats_per_token
    setting = make_setting(model, Recipe("greedy", sparsify=method), windows_of())
    found = find(method, setting)
    accepted = int(found.notes[-1].split()[0])
    sparse = sparsify(families.family("llama"), method, windows_of())
    assert accepted > 0
    assert perplexity(sparse, windows_of()).nats_per_token <= dense * factor**accepted * (1 + 1e-5)


def test_a_projection_without_a_say_gets_the_most() -> None:
    model = families.family("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
    model = sparsify(model, GreedySequential(sparsity=0.8, step=0.2, loss_increase=1.0001), windows_of())
    masks = {site: s for s in sparsity_of(model).sparsifiers if s.applies_to(0) for site in s.sites}
    with torch.no_grad():
        inputs: list[torch.Tensor] = []
        model.model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
        model(torch.from_numpy(windows_of(seed=1)))
    assert masks["gate"].threshold and masks["up"].threshold and masks["down"].threshold
    assert float((inputs[0] == 0).double().mean()) == pytest.approx(0.8, abs=0.05)


def test_no_growth_allowed_means_steps_that_lower_the_loss_at_most() -> None:
    model = sparsify(families.family("llama"), GreedySequential(loss_increase=1.0, step=0.3), windows_of())
    dense = perplexity(families.family("llama"), windows_of()).nats_per_token
    assert perplexity(model, windows_of()).nats_per_token <= dense * (1 + 1e-6)
