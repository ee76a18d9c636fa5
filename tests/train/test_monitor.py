"""What the monitor counts is what keeping every activation would count."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import families
from relufy.method import Relufication
from relufy.methods.sparsify import sparsify
from relufy.model.structure import find_blocks
from relufy.train import monitor as monitor_file
from relufy.train.monitor import Monitor, NeuronCounts

IDS = torch.randint(0, 53, (3, 19), generator=torch.Generator().manual_seed(0))


def relufied(name: str = "llama", stage: int = 1) -> nn.Module:
    model = families.family(name)
    if name not in families.NATIVELY_SPARSE:
        sparsify(model, Relufication(stage=stage))
    return model


def kept_neurons(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return each layer's neurons, `[windows, length, neurons]`."""
    kept: list[torch.Tensor] = []
    handles = [
        block.activation.module.register_forward_hook(lambda _m, _a, output: kept.append(output.detach()))
        for block in find_blocks(model)
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return [values.reshape(*ids.shape, -1) for values in kept]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3", "falcon", "nemotron"])
def test_the_figures_are_the_definitions(name: str) -> None:
    model = relufied(name)
    monitor = Monitor(model)
    with monitor.watching():
        model(IDS)
    found = monitor.metrics()
    assert set(found) == {"sparsity", "live_sparsity", "dead", "union_density", "dead_positions"}
    assert set(found["sparsity"]) == {"neuron"} and found["dead_positions"] == 57
    for layer, values in enumerate(kept_neurons(model, IDS)):
        is_active = values != 0
        is_live = is_active.any(0).any(0)
        united = is_active[:, :16].reshape(3, 2, 8, -1).any(2)
        assert found["sparsity"]["neuron"][layer] == pytest.approx(1 - is_active.float().mean().item())
        live = 1 - is_active[..., is_live].float().mean().item()
        assert found["live_sparsity"][layer] == pytest.approx(live, abs=1e-6)
        assert found["dead"][layer] == pytest.approx(1 - is_live.float().mean().item(), abs=1e-6)
        assert found["union_density"][layer] == pytest.approx(united.float().mean().item(), abs=1e-6)


def test_every_sparse_site_is_there_and_no_other() -> None:
    model = sparsify(relufied(stage=1), Relufication(stage=2))
    monitor = Monitor(model)
    with monitor.watching():
        model(IDS)
    found = monitor.metrics()["sparsity"]
    assert list(found) == ["q", "k", "v", "gate", "up", "neuron"]
    assert found["q"] == found["k"] == found["v"] and all(0.2 < share < 0.8 for share in found["q"])


def test_a_dense_model_has_no_metrics() -> None:
    model = families.family("llama")
    monitor = Monitor(model)
    with monitor.watching():
        model(IDS)
        assert not any(module._forward_hooks for module in model.modules())
    assert monitor.metrics() == {}


def test_a_report_is_of_what_came_since_the_last() -> None:
    model = relufied()
    monitor, fresh = Monitor(model), Monitor(model)
    assert monitor.metrics() == {}
    with monitor.watching():
        model(IDS[:2])
        monitor.metrics()
        model(IDS[2:, :9])
    with fresh.watching():
        model(IDS[2:, :9])
    later, alone = monitor.metrics(), fresh.metrics()
    assert later["sparsity"] == alone["sparsity"] and later["union_density"] == alone["union_density"]
    assert later["dead_positions"] == 2 * 19 + 9 and alone["dead_positions"] == 9
    assert all(a <= b for a, b in zip(later["dead"], alone["dead"], strict=True))
    assert monitor.metrics() == {}


def test_recomputation_is_not_counted_again() -> None:
    model = relufied().train()
    whole, again = Monitor(model), Monitor(model)
    with whole.watching():
        model(IDS)
    model.gradient_checkpointing_enable()
    with again.watching():
        model(IDS).logits.sum().backward()
    assert again.metrics() == whole.metrics()


def test_adapters_hide_nothing() -> None:
    model = relufied()
    before, after = Monitor(model), Monitor(model)
    with before.watching():
        model(IDS)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2))
    with after.watching():
        adapted(IDS)
    assert after.metrics() == before.metrics()


def test_short_windows_have_no_union() -> None:
    model = relufied()
    monitor = Monitor(model)
    with monitor.watching():
        model(IDS[:, :7])
    assert "union_density" not in monitor.metrics()


def test_a_neuron_that_falls_silent_dies_after_enough_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_file, "DEAD_POSITIONS", 32)
    counts = NeuronCounts()
    active = torch.ones(1, 16, 2)
    silent = active * torch.tensor([1.0, 0.0])
    for values, dead, remembered in [
        (active, 0.0, 16),
        (silent, 0.0, 32),
        (silent, 0.0, 48),
        (silent, 0.0, 64),
        (silent, 0.5, 48),
    ]:
        counts.see(values == 0)
        assert (float(counts.report()["dead"]), counts.remembered) == (dead, remembered)
    counts.see(active == 0)
    assert float(counts.report()["dead"]) == 0.0


def test_live_sparsity_leaves_dead_neurons_out() -> None:
    counts = NeuronCounts()
    values = torch.zeros(1, 4, 4)
    values[0, 0, 0] = values[0, 1, 0] = values[0, 2, 1] = 1.0
    counts.see(values == 0)
    report = counts.report()
    assert float(report["dead"]) == 0.5
    assert float(report["live_sparsity"]) == 1 - 3 / 8
