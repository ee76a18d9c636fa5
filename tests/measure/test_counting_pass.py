"""What a pass counts is what keeping everything would give, however the text comes."""

from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from counted import counted, kept_zeros, ragged, relufied, windows_of

import families
from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.measure.counting_pass import Counted
from relufy.measure.definitions import measure_zeros
from relufy.measure.modes import Scored
from relufy.measure.preactivations import measure_preactivations
from relufy.measure.quality import perplexity
from relufy.measure.sparsity import measure_sparsity
from relufy.model.sparsifiers import apply_sparsity
from relufy.model.structure import find_blocks
from relufy.schema import to_mapping

FAMILIES = ["llama", "gpt2", "opt", "phi3", "falcon"]


def figures(found: Counted) -> dict[str, Any]:
    """Return all that is made of whole numbers."""
    return {name: asdict(getattr(found, name)) for name in ("zeros", "unions")} | {
        "tokens": found.tokens,
        "windows": found.windows,
        "sites": {site: asdict(shares) for site, shares in found.sites.items()},
        "neurons": {site: asdict(shares) for site, shares in found.neurons.items()},
        "counts": [layer.counts for layer in found.preactivations.layers],
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_sites_are_what_every_token_has(name: str) -> None:
    model, windows = relufied(name), ragged(7, 12)
    found = counted(model, windows)
    assert (found.tokens, found.windows) == (sum(map(len, windows)), 7)
    for (site, layer), kept in kept_zeros(model, windows).items():
        shares, by_token = found.sites[site], np.concatenate(kept).mean(1)
        opening = np.concatenate([np.arange(len(window)) < 1 for window in windows])
        assert shares.mean[layer] == pytest.approx(by_token.mean())
        for percent, value in ((5, shares.p5[layer]), (95, shares.p95[layer])):
            assert value == pytest.approx(np.percentile(by_token, percent, method="inverted_cdf"))
        assert shares.first_token[layer] == pytest.approx(by_token[opening].mean())
        assert shares.first_percent[layer] == shares.first_token[layer]
        assert shares.rest[layer] == pytest.approx(by_token[~opening].mean())


@pytest.mark.parametrize("name", FAMILIES)
def test_neurons_are_dead_where_no_token_needs_them(name: str) -> None:
    model, windows = relufied(name), ragged(2, 4)
    found = counted(model, windows)
    for site in ("neuron", "down"):
        for layer, dead in enumerate(found.neurons[site].dead):
            zeros = np.concatenate(kept_zeros(model, windows)[site, layer])
            is_live = ~zeros.all(0)
            live = zeros[:, is_live].mean(1)
            assert dead == pytest.approx(1 - is_live.mean())
            assert found.neurons[site].live_sparsity[layer] == pytest.approx(live.mean())
            for percent, value in (
                (5, found.neurons[site].live_p5[layer]),
                (95, found.neurons[site].live_p95[layer]),
            ):
                assert value == pytest.approx(np.percentile(live, percent, method="inverted_cdf"))
    assert any(0 < dead < 1 for dead in found.neurons["down"].dead)


@pytest.mark.parametrize("name", FAMILIES)
def test_unions_are_those_of_whole_runs(name: str) -> None:
    model, windows = relufied(name), ragged(6, 13)
    found = counted(model, windows).unions
    assert found.runs == {run: sum(len(window) // run for window in windows) for run in (2, 4, 8)}
    for (site, layer), kept in kept_zeros(model, windows).items():
        if site not in found.consecutive:
            continue
        for run in found.runs:
            active = [
                1 - zeros[at : at + run].all(0).mean()
                for zeros in kept
                for at in range(0, len(zeros) - run + 1, run)
            ]
            assert found.consecutive[site][run][layer] == pytest.approx(np.mean(active))
    assert set(found.groups) == {2, 4} and found.groups[4] == 8


def test_batch_unions_grow_with_the_group_and_are_above_one_token() -> None:
    found = counted(relufied(), windows_of(70, 6))
    assert found.unions.groups == {2: 280, 4: 136, 8: 64, 16: 32, 32: 16, 64: 8}
    for layer in (0, 1):
        densities = [1 - found.sites["down"].mean[layer]]
        densities += [shares[layer] for shares in found.unions.batches["down"].values()]
        assert all(less < more for less, more in pairwise(densities))


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_family_is_measured(name: str) -> None:
    model, windows = families.family(name), ragged(4, 7)
    found = counted(model, windows)
    assert found.tokens == sum(map(len, windows))
    is_sparse = name in families.NATIVELY_SPARSE
    assert all((share > 0.1) == is_sparse for share in found.sites["neuron"].mean)
    assert (found.zeros.model_level_p5 > 0) == is_sparse
    for layer, block in zip(found.preactivations.layers, find_blocks(model), strict=True):
        assert sum(layer.counts) == found.tokens * block.down.shape[1]
    assert min(found.hidden.first_token + found.hidden.rest + found.hidden.median) > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_peaks_by_place(name: str) -> None:
    model, windows = relufied(name), ragged(5, 9)
    kept: list[list[torch.Tensor]] = [[], []]
    handles = [
        model.get_submodule(block.name).register_forward_hook(
            lambda _m, _a, output, to=kept[block.index]: to.append(
                (output[0] if isinstance(output, tuple) else output)[0]
            )
        )
        for block in find_blocks(model)
    ]
    with torch.inference_mode():
        for window in windows:
            model(torch.from_numpy(window)[None])
    for handle in handles:
        handle.remove()
    found = counted(model, windows).hidden
    for layer, states in enumerate(kept):
        assert found.first_token[layer] == pytest.approx(max(h[0].abs().max().item() for h in states))
        assert found.rest[layer] == pytest.approx(max(h[1:].abs().max().item() for h in states))
        sampled = torch.cat([h[1::16].flatten() for h in states]).abs()
        assert found.median[layer] == pytest.approx(sampled.median().item(), rel=0.02)
    assert found.first_percent == found.first_token


@pytest.mark.parametrize("batch_size", [1, 2, 3, 17])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_neither_batches_nor_padding_matter(name: str, batch_size: int) -> None:
    model = relufied(name)
    for windows in (windows_of(9, 11), ragged(9, 11)):
        expected, found = counted(model, windows, batch_size=5), counted(model, windows, batch_size)
        assert figures(found) == figures(expected)
        assert found.perplexity.nats_per_token == pytest.approx(expected.perplexity.nats_per_token, rel=1e-6)


def test_padding_that_the_tokenizer_made_is_not_counted() -> None:
    from relufy.measure.measure import measure

    model, windows = relufied(), ragged(6, 8)
    ids, mask = np.full((6, 8), 50), np.zeros((6, 8), dtype=int)
    for row, window in enumerate(windows):  # on the left
        ids[row, 8 - len(window) :], mask[row, 8 - len(window) :] = window, 1
    padded = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    assert measure(model, padded) == measure(model, windows)


def test_a_stream_is_the_same_as_all_at_once() -> None:
    from relufy.measure.measure import measure

    model, windows = relufied(), np.stack(windows_of(10, 7))
    expected = measure(model, windows)
    assert measure(model, (window for window in windows)) == expected
    assert measure(model, torch.from_numpy(windows)) == expected
    assert measure(model, windows, max_windows=3) == measure(model, windows[:3])


def test_other_counters_agree() -> None:
    model, windows = relufied(), np.stack(windows_of(6, 12))
    found, dense = counted(model, windows, dense=families.family("llama")), families.family("llama")
    assert found.perplexity == perplexity(model, windows, 4)
    assert found.dense_perplexity == perplexity(dense, windows, 4)
    assert {site: shares.mean for site, shares in found.sites.items()} == measure_sparsity(
        model, windows, 4
    ).sparsity
    expected, _ = measure_zeros(model, np.pad(windows, ((0, 0), (0, 1))), Scored("all", 13), 4)
    assert found.zeros == expected
    assert to_mapping(found.preactivations) == to_mapping(measure_preactivations(model, windows, 4))


def test_losses_of_windows_of_different_lengths() -> None:
    model, windows = relufied(), ragged(5, 9)
    found = counted(model, windows).perplexity
    alone = [perplexity(model, window[None]).nats_per_token for window in windows]
    weights = [len(window) - 1 for window in windows]
    assert found.tokens == sum(weights)
    assert found.per_window == pytest.approx(alone, rel=1e-5)
    assert found.nats_per_token == pytest.approx(np.average(alone, weights=weights), rel=1e-5)
    assert found.standard_error > 0


def test_the_first_percent_is_counted_apart() -> None:
    keep_all_but_late = Sparsifier(("o",), "topk", k=6, dense_first_tokens=3)
    model = apply_sparsity(families.family("llama"), ActivationSparsity((keep_all_but_late,)))
    found = counted(model, windows_of(2, 24))
    assert found.sites["o"].first_token == (0, 0)
    assert found.sites["o"].mean == pytest.approx((0.75 * 21 / 24,) * 2)
    assert found.sites["o"].rest == pytest.approx((0.75 * 21 / 23,) * 2)


def test_a_model_in_parts_on_several_devices() -> None:
    """Accelerate's hooks move what blocks read; here they find every part on the one device there is."""
    from accelerate import dispatch_model

    expected = counted(relufied(), windows_of(5, 8))
    model = relufied()
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    dispatched = dispatch_model(model, places, main_device="cpu", force_hooks=True)
    assert figures(counted(dispatched, windows_of(5, 8))) == figures(expected)
