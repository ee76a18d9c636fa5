"""The gamma-interval experiment: equal to the paper's loop, token by token, and to a decoding one."""

import numpy as np
import pytest
import torch
from tests.measure.made_traces import bernoulli, windows_of

import families
from relufy.errors import UserError
from relufy.measure.gamma_interval import Blocks, GammaInterval, gamma_interval, loaded_before
from relufy.measure.quality import perplexity
from relufy.method import Relufication
from relufy.methods.sparsify import sparsify
from relufy.model.sites import find_sites


class Loop:
    """The paper's loop, for one layer."""

    def __init__(self, blocks: Blocks, width: int) -> None:
        self.blocks, self.time = blocks, 0
        self.loaded = torch.zeros(width, dtype=torch.bool)

    def step(self, a: torch.Tensor) -> torch.Tensor:
        after = self.time - self.blocks.warmup
        if after < 0 or (after // self.blocks.gamma) % 2 == 0:
            if self.blocks.reset and after >= 0 and after % (2 * self.blocks.gamma) == 0:
                self.loaded = torch.zeros_like(self.loaded)
            self.loaded = self.loaded | (a != 0)
        else:
            a = torch.where(self.loaded, a, 0)
        self.time += 1
        return a


def relufied(name: str = "llama"):
    model = families.family(name)
    return model if name == "opt" else sparsify(model, Relufication())


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(("gamma", "warmup"), [(1, 0), (2, 3), (3, 5), (7, 4), (20, 4)])
def test_loaded_neurons_are_those_of_the_loop(gamma: int, warmup: int, reset: bool) -> None:
    active = torch.from_numpy(bernoulli(np.full(19, 0.08), 3, 30))
    blocks = Blocks(30, gamma, warmup, reset)
    loaded = loaded_before(active, blocks)
    for window in range(3):
        loop = Loop(blocks, 19)
        for time, row in enumerate(active[window]):
            loop.step(row)
            assert torch.equal(loaded[window, time], loop.loaded)


def test_blocks_are_equal_and_the_first_is_open() -> None:
    blocks = Blocks(13, gamma=2, warmup=3)
    assert np.flatnonzero(blocks.is_frozen()).tolist() == [5, 6, 9, 10]
    assert blocks.frozen_blocks().tolist() == [5, 9]
    assert Blocks(8, gamma=1, warmup=2).frozen_blocks().tolist() == [3, 5, 7]


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(("name", "site"), [("llama", "neuron"), ("opt", "down"), ("phi3", "down")])
def test_one_pass_is_decoding_token_by_token(name: str, site: str, reset: bool) -> None:
    model, windows = relufied(name), windows_of(2)
    found = gamma_interval(model, windows, (3,), warmup=4, reset=reset, site=site, batch_size=2)
    blocks = Blocks(23, 3, 4, reset)
    for window, expected in zip(windows, found.points[0].perplexity.per_window, strict=True):
        losses = decoded(model, window, blocks, site)
        assert float(losses[4:].mean()) == pytest.approx(expected, abs=1e-4)
    assert found.points[0].frozen_difference.mean != 0


def decoded(model, window: np.ndarray, blocks: Blocks, site: str) -> torch.Tensor:
    """Return the losses of a decoding with a cache, where each layer keeps its loaded neurons."""
    handles, cache, losses = [], None, []
    for block in find_sites(model):
        loop = Loop(blocks, 43)
        if site == "neuron":
            handle = block.activation.module.register_forward_hook(
                lambda _m, _a, out, loop=loop: loop.step(out.flatten()).view_as(out)
            )
        else:
            handle = block.down.module.register_forward_pre_hook(
                lambda _m, args, loop=loop: (loop.step(args[0].flatten()).view_as(args[0]),)
            )
        handles.append(handle)
    ids = torch.from_numpy(window)
    with torch.inference_mode():
        for time in range(len(ids) - 1):
            out = model(ids[None, time : time + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            losses.append(-out.logits[0, -1].log_softmax(-1)[ids[time + 1]])
    for handle in handles:
        handle.remove()
    return torch.stack(losses)


def test_batches_change_nothing() -> None:
    model, windows = relufied(), windows_of(5)
    options = {"gammas": (1, 4), "warmup": 6}
    one, two, all_ = (gamma_interval(model, windows, **options, batch_size=size) for size in (1, 2, 5))
    for a, b, c in zip(one.points, two.points, all_.points, strict=True):
        assert a.perplexity.per_window == pytest.approx(b.perplexity.per_window, abs=1e-4)
        assert a.perplexity.per_window == pytest.approx(c.perplexity.per_window, abs=1e-4)
        assert a.loaded_share == pytest.approx(b.loaded_share, abs=1e-3)


def test_random_sets_are_as_large_as_the_reused_ones() -> None:
    found = gamma_interval(relufied(), windows_of(6), (1, 2), warmup=2, reset=True)
    assert isinstance(found, GammaInterval) and len(found.points) == 4
    for reused, random in zip(found.of("reuse"), found.of("random"), strict=True):
        assert random.loaded_share == reused.loaded_share < 1
        assert random.dropped_share > reused.dropped_share > 0


def test_where_everything_is_loaded_nothing_changes() -> None:
    """A long warm-up loads all neurons that the rest needs: both kinds are the unlimited model."""
    model, windows = relufied(), np.full((2, 24), 7)
    found = gamma_interval(model, windows, (2,), warmup=8)
    reused = found.of("reuse")[0]
    assert reused.dropped_share == pytest.approx(0, abs=0.02)
    losses = perplexity(model, windows).nats_per_token
    assert found.perplexity.nats_per_token == pytest.approx(losses, abs=0.5)


def test_plain_data_has_no_lists_of_windows() -> None:
    plain = gamma_interval(relufied(), windows_of(2), (2,), warmup=4).to_json()
    assert "per_window" not in plain["points"][0]["perplexity"]
    assert plain["points"][0]["kind"] == "reuse"


def test_what_cannot_be_asked() -> None:
    model, windows = relufied(), windows_of(2)
    with pytest.raises(UserError, match="no token of a window of 24 is frozen"):
        gamma_interval(model, windows, (8,), warmup=16)
    with pytest.raises(UserError, match="gammas are 1 or more"):
        gamma_interval(model, windows, (0,), warmup=4)
    with pytest.raises(UserError, match="there is no site 'q'"):
        gamma_interval(model, windows, (2,), warmup=4, site="q")
    with pytest.raises(UserError, match="no entry of neuron is ever zero"):
        gamma_interval(families.family("llama"), windows, (2,), warmup=4)
