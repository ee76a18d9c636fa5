"""Controls keep as many entries as the method did: drawn ones, or the ones that matter most."""

import numpy as np
import pytest
import torch

import families
from relufy.activation_sparsity import Sparsifier
from relufy.measure.modes import Scored, window_losses
from relufy.methods.controls import masked_shares, put_controls
from relufy.model.sites import find_sites
from relufy.model.trial import trial_masks

WINDOWS = np.random.default_rng(3).integers(3, 53, (4, 16))
SITES = ("q", "k", "v", "o", "gate", "up", "down", "neuron")


class Seen:
    """What passes the projections' inputs of a model while controls are tried on it."""

    def __init__(self, name: str, kind: str, shares: dict, mode: str = "all", seed: int = 0) -> None:
        self.model = families.family(name)
        self.blocks = find_sites(self.model)
        self.inputs: dict[str, torch.Tensor] = {}
        scored = Scored(mode, 16)
        with trial_masks(self.blocks) as trial:
            for site, projection in self.blocks[1].projections().items():
                projection.module.register_forward_pre_hook(self._keeper(site))
            put_controls(kind, trial, self.blocks, shares, scored, seed)
            self.losses = window_losses(self.model, WINDOWS, scored, 2)

    def _keeper(self, site: str):
        def keep(_module, args) -> None:
            self.inputs[site] = args[0]

        return keep

    def kept(self, site: str) -> torch.Tensor:
        return self.inputs[site] != 0


def test_shares_are_those_of_the_masked_sites() -> None:
    masks = [
        Sparsifier(("q", "k", "v"), "threshold", threshold=0.1, layers=(1,)),
        Sparsifier(("neuron",), "threshold", threshold=0.1),
    ]
    measured = {site: (0.1, 0.2) for site in SITES}
    found = masked_shares(find_sites(families.family("llama")), masks, measured)
    assert found == {(1, "q"): 0.2, (1, "k"): 0.2, (1, "v"): 0.2, (0, "neuron"): 0.1, (1, "neuron"): 0.2}


@pytest.mark.parametrize("kind", ["random", "oracle"])
def test_every_token_keeps_as_many(kind: str) -> None:
    seen = Seen("llama", kind, {(1, "q"): 0.5, (1, "o"): 0.26, (1, "down"): 0.9})
    for site, count in (("q", 12), ("o", 18), ("down", 4), ("gate", 24)):
        assert (seen.kept(site).sum(-1) == count).all()


def test_readers_of_one_tensor_draw_the_same() -> None:
    shares = {(1, site): 0.5 for site in ("q", "k", "v", "gate", "up")}
    seen = Seen("llama", "random", shares)
    assert torch.equal(seen.kept("q"), seen.kept("v"))
    assert torch.equal(seen.kept("gate"), seen.kept("up"))
    assert not torch.equal(seen.kept("q"), seen.kept("gate"))


def test_a_seed_repeats_and_another_does_not() -> None:
    shares = {(1, "o"): 0.5}
    losses = [Seen("llama", "random", shares, seed=seed).losses.per_window for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_the_oracle_keeps_what_weighs_most() -> None:
    dense, seen = Seen("llama", "oracle", {}), Seen("llama", "oracle", {(1, "o"): 0.5})
    score = dense.inputs["o"].abs() * dense.blocks[1].o.module.weight.norm(dim=0)
    least_kept = torch.where(seen.kept("o"), score, torch.inf).amin(-1)
    greatest_left = torch.where(seen.kept("o"), -torch.inf, score).amax(-1)
    assert (least_kept > greatest_left).all()


def test_the_oracle_of_neurons_sees_their_whole_activation() -> None:
    """Gates alone do not tell: it has to be |gate * up|, at the input of down."""
    dense, seen = Seen("llama", "oracle", {}), Seen("llama", "oracle", {(1, "neuron"): 0.5})
    score = dense.inputs["down"].abs() * dense.blocks[1].down.module.weight.norm(dim=0)
    assert torch.equal(seen.kept("down"), score >= score.topk(22).values[..., -1:])


def test_the_oracle_moves_the_next_layer_less_than_chance() -> None:
    shares = {(0, site): 0.5 for site in ("q", "k", "v", "o", "gate", "up", "down")}
    dense, random, oracle = (
        Seen("llama", kind, wanted).inputs["q"]
        for kind, wanted in (("random", {}), ("random", shares), ("oracle", shares))
    )
    assert (oracle - dense).norm() < 0.7 * (random - dense).norm()


def test_zeros_that_are_there_are_not_drawn() -> None:
    seen = Seen("opt", "random", {(1, "down"): 0.8})
    assert (seen.kept("down").sum(-1) == round(0.2 * 43)).all()


@pytest.mark.parametrize(("mode", "dense"), [("second-half", 8), ("decode", 0)])
def test_only_scored_positions_are_masked(mode: str, dense: int) -> None:
    seen = Seen("llama", "random", {(1, "o"): 0.5}, mode)
    counts = seen.kept("o").sum(-1)
    assert (counts[:, :dense] == 24).all() and (counts[:, dense:] == 12).all()


def test_a_share_of_1_leaves_nothing() -> None:
    assert not Seen("llama", "oracle", {(1, "o"): 1.0}).kept("o").any()
