"""Zeros are counted exactly: every token once, padding never."""

from collections import defaultdict

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import families
from relufy.methods.sparsify import sparsify
from relufy.model.observe import observe_sites
from relufy.model.sites import find_sites

IDS = torch.tensor([[3, 4, 5, 50, 7], [0, 1, 2, 9, 9], [8, 8, 30, 31, 32]])


def naive_counts(model: nn.Module, batches: list[torch.Tensor]) -> dict[str, list[int]]:
    """Count zeros by keeping every tensor: site -> one count per layer."""
    kept: defaultdict[tuple[str, int], list[torch.Tensor]] = defaultdict(list)
    handles = []
    for block in find_sites(model):
        for site, projection in block.projections().items():
            handles.append(
                projection.module.register_forward_pre_hook(
                    lambda _m, args, key=(site, block.index): kept[key].append(args[0])
                )
            )
        handles.append(
            block.activation.module.register_forward_hook(
                lambda _m, _a, output, key=("neuron", block.index): kept[key].append(output)
            )
        )
    for batch in batches:
        model(batch)
    for handle in handles:
        handle.remove()
    sites = dict.fromkeys(site for site, _ in kept)
    return {site: [sum(int((x == 0).sum()) for x in kept[site, layer]) for layer in (0, 1)] for site in sites}


@pytest.mark.parametrize("name", families.STAGE_2)
def test_counts_are_the_naive_ones(name: str) -> None:
    model = families.family(name)
    if name != "opt":
        sparsify(model, "relufy-stage1")
    sparsify(model, "relufy-stage2")
    batches = [IDS, IDS[:1, :2]]
    with observe_sites(model) as observer:
        for batch in batches:
            model(batch)
    assert observer.tokens == 17
    assert observer.zeros() == naive_counts(model, batches)
    widths = {site: p.shape[1] for site, p in find_sites(model)[0].projections().items()}
    for site, width in widths.items():
        assert observer.sparsity()[site] == [zeros / (17 * width) for zeros in observer.zeros()[site]]


@pytest.mark.parametrize("name", families.STAGE_2)
def test_padding_is_not_counted(name: str) -> None:
    model = families.family(name)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    with observe_sites(model) as padded:
        model(IDS, attention_mask=mask)
    with observe_sites(model) as apart:
        for row, length in zip(IDS, mask.sum(1).tolist(), strict=True):
            model(row[None, :length])
    assert padded.tokens == apart.tokens == 9
    assert padded.zeros() == apart.zeros()


def test_decoding_with_a_cache_counts_every_token_once() -> None:
    model = sparsify(families.family("llama"), "relufy-stage2")
    with observe_sites(model) as observer:
        ids = model.generate(IDS[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert ids.shape[1] == 9
    assert observer.tokens == 8  # the last token is written, but never read


def test_recomputation_in_the_backward_pass_is_not_counted() -> None:
    model = sparsify(families.family("llama"), "relufy-stage1").train()
    model.gradient_checkpointing_enable()
    with observe_sites(model) as observer:
        model(IDS, labels=IDS).loss.backward()
    assert observer.tokens == 15
    assert max(observer.sparsity()["neuron"]) <= 1.0


def test_an_adapted_model_is_observed_inside() -> None:
    model = sparsify(families.family("llama"), "relufy-stage2")
    with observe_sites(model) as plain:
        model(IDS)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2))
    with observe_sites(adapted) as observer:
        adapted(IDS)
    assert observer.zeros() == plain.zeros()


def test_hooks_are_gone_afterwards_even_after_an_error() -> None:
    model = families.family("llama")
    with pytest.raises(IndexError), observe_sites(model):
        model(torch.tensor([[53]]))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_nothing_observed_is_an_error() -> None:
    with observe_sites(families.family("llama")) as observer:
        pass
    with pytest.raises(ValueError, match="nothing was observed"):
        observer.sparsity()
