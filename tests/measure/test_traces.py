"""Traces: what the model does at each token, without padding, whatever the batches."""

import numpy as np
import pytest
import torch
from tests.measure.made_traces import windows_of

import families
from relufy.errors import UserError
from relufy.measure.traces import Trace, batches_of, watch_traces
from relufy.method import Relufication
from relufy.methods.sparsify import sparsify
from relufy.model.sites import find_sites


def traces_of(model, windows: np.ndarray, size: int, lengths=None, skip: int = 0, site="neuron"):
    """Return by layer what is active at all tokens in a row, and how many tokens were counted."""
    found: dict[int, list[torch.Tensor]] = {}

    def watch(trace: Trace) -> None:
        found.setdefault(trace.layer, []).append(trace.active[trace.is_token()])

    batches = batches_of(windows, size, 53, lengths)
    tokens = watch_traces(model, batches, site, watch, skip)
    return [torch.cat(found[layer]) for layer in sorted(found)], tokens


@pytest.mark.parametrize("name", ["llama", "opt", "phi3", "gpt2"])
def test_a_trace_is_what_the_activation_returns(name: str) -> None:
    model = families.family(name)
    model = model if name == "opt" else sparsify(model, Relufication())
    windows, seen = windows_of(3), []
    module = find_sites(model)[1].activation.module
    handle = module.register_forward_hook(lambda _m, _a, output: seen.append(output))
    with torch.inference_mode():
        model(torch.from_numpy(windows), use_cache=False)
    handle.remove()
    found, tokens = traces_of(model, windows, 2)
    assert tokens == windows.size and len(found) == 2
    assert torch.equal(found[1], seen[0].reshape(windows.size, -1) != 0)
    assert 0.1 < found[1].float().mean() < 0.9


@pytest.mark.parametrize("size", [1, 2, 5])
def test_batches_and_padding_change_nothing(size: int) -> None:
    model = sparsify(families.family("llama"), Relufication())
    lengths = [9, 24, 3, 24, 17]
    windows = windows_of(5)
    alone = [
        traces_of(model, window[None, :length], 1, skip=2)
        for window, length in zip(windows, lengths, strict=True)
    ]
    found, tokens = traces_of(model, windows, size, lengths, skip=2)
    assert tokens == sum(lengths) - 2 * 5
    for layer in range(2):
        assert torch.equal(found[layer], torch.cat([traces[layer] for traces, _ in alone]))


def test_a_site_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"there is no site 'gate' here.*neuron"):
        traces_of(families.family("opt"), windows_of(1), 1, site="gate")
