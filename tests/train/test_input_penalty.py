"""The penalty on stage 2's inputs: the term, its gradient, its target, and who has no such inputs."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from families import family
from relufy.errors import UserError
from relufy.method import Relufication
from relufy.methods.sparsify import sparsify
from relufy.model.observe import observe_sites
from relufy.recipe import Finetune, Penalty
from relufy.train.finetune import finetune
from relufy.train.input_penalty import InputPenalty

SETTINGS = Finetune(steps=30, batch_size=4, window=8, learning_rate=1e-2, warmup_steps=2)


def stage2(name: str = "llama"):
    return sparsify(family(name), Relufication(stage=2))


def windows() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 53, (16, 8))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_the_term_is_the_mean_of_what_the_norms_give(name: str, checkpointing: bool) -> None:
    model, seen = stage2(name).train(), []
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    penalty = InputPenalty(model, Penalty(), 1)
    ids = torch.from_numpy(windows()[:2])
    with penalty.attached():
        model(input_ids=ids, use_cache=False)
        term = penalty.term()
        term.backward()
    with torch.no_grad():
        plain = copy.deepcopy(model).eval()
        norms = {id(n.module): n.module for n in norms_of(plain)}.values()
        handles = [norm.register_forward_hook(lambda _m, _a, out: seen.append(out)) for norm in norms]
        plain(input_ids=ids, use_cache=False)
    assert len(handles) == len(seen) and term.item() == pytest.approx(
        sum(o.abs().mean().item() for o in seen)
    )
    assert next(iter(norms_of(model))).module.weight.grad.abs().sum() > 0


def norms_of(model):
    from relufy.model.sites import find_sites

    return [norm for block in find_sites(model) for norm, _ in block.shared_inputs() if norm is not None]


def test_inputs_get_sparser_than_without() -> None:
    def zeros(settings: Finetune) -> float:
        model = stage2()
        finetune(model, settings, windows())
        with observe_sites(model) as observer, torch.no_grad():
            model(input_ids=torch.from_numpy(windows()))
        return float(np.mean(observer.sparsity()["q"] + observer.sparsity()["gate"]))

    penalised = dataclasses.replace(SETTINGS, input_penalty=Penalty(strength=(3.0,)))
    steered = dataclasses.replace(SETTINGS, input_penalty=Penalty(target=0.75))
    plain = zeros(SETTINGS)
    assert zeros(penalised) > plain + 0.03
    assert zeros(steered) > plain + 0.03


def test_both_penalties_are_reported_apart() -> None:
    both = dataclasses.replace(
        SETTINGS, steps=3, penalty=Penalty(target=0.9), input_penalty=Penalty(target=0.7)
    )
    log = finetune(stage2(), both, windows()).logs[-1]
    assert log["target_sparsity"] == 0.9 and log["input_target_sparsity"] == 0.7
    terms = log["cross_entropy"], log["penalty"] * log["penalty_strength"]
    assert log["loss"] == pytest.approx(
        sum(terms) + log["input_penalty"] * log["input_penalty_strength"], rel=1e-4
    )


def test_a_model_without_sparse_inputs_is_refused() -> None:
    model = sparsify(family("llama"), Relufication(stage=1))
    with pytest.raises(UserError, match="stage 2"):
        finetune(model, dataclasses.replace(SETTINGS, input_penalty=Penalty()), windows())
