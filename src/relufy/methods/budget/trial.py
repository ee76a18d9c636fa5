"""Trying out what a method found: its masks on the model for a while, what passes them, what they cost."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.measure.quality import evaluating, kl_divergence, log_likelihood
from relufy.methods.budget.bound import Rise, rise
from relufy.methods.budget.clock import Clock
from relufy.methods.budget.cost import Cost, CostModel, Shares
from relufy.methods.setting import Found, Setting
from relufy.model.configuration import sparsity_of
from relufy.model.places import find_places
from relufy.model.selections import Selection, TokenPositions
from relufy.model.sparsifiers import placed
from relufy.model.structure import BlockSites
from relufy.model.trial import Mask, Trial, trial_masks

KL_TOKENS = 2048
KL_NUMBERS = 1 << 26
"""The most logits of the dense model that are kept, to compare with."""


@dataclass(frozen=True)
class Outcome:
    """What masks cost on the selection text, in quality and for the engine."""

    rise: Rise
    cost: Cost


class Trials:
    """Runs candidates on a model; what the dense model says is computed once."""

    def __init__(
        self, setting: Setting, trial: Trial, costs: CostModel, selection: np.ndarray, clock: Clock
    ) -> None:
        self._setting, self._trial, self._clock = setting, trial, clock
        self.costs = costs
        self._selection = selection
        self._losses: np.ndarray | None = None
        self._kept_windows = _few_windows(setting)
        self._expected: list[torch.Tensor] = []

    def outcome(self, found: Found) -> Outcome:
        """Return what a candidate does on the selection text."""
        if self._losses is None:
            self._losses = self._nats(self._selection, Found(()))[0]
        losses, shares = self._nats(self._selection, found)
        return Outcome(rise((losses - self._losses).tolist()), self.costs.cost(found, shares))

    def kl(self, found: Found) -> tuple[float, Cost]:
        """Return KL(dense || masked) on some of the calibration text, nats per token, and the cost there."""
        if not self._expected:
            self._expected = [logits for logits, _ids in self._run(self._kept_windows)]
        with self._masked(found) as counts:
            sums = [
                float(kl_divergence(expected, logits).double().mean())
                for expected, (logits, _ids) in zip(
                    self._expected, self._run(self._kept_windows), strict=True
                )
            ]
        return sum(sums) / len(sums), self.costs.cost(found, counts.shares())

    def perplexity(self, windows: np.ndarray, found: Found) -> np.ndarray:
        """Return each window's nats per token."""
        return self._nats(windows, found)[0]

    def _nats(self, windows: np.ndarray, found: Found) -> tuple[np.ndarray, Shares]:
        with self._masked(found) as counts:
            means = [
                -log_likelihood(logits, ids[:, 1:]).double().mean(1) for logits, ids in self._run(windows)
            ]
        return torch.cat(means).cpu().numpy(), counts.shares()

    def _run(self, windows: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        model, size = self._setting.model, self._setting.calibration.batch_size
        with evaluating(model):
            for start in range(0, len(windows), size):
                self._clock.check()
                ids = torch.from_numpy(windows[start : start + size]).to(model.device)
                yield model(input_ids=ids, use_cache=False).logits[:, :-1], ids

    @contextmanager
    def _masked(self, found: Found) -> "Iterator[_Counts]":
        counts = _Counts(self.costs)
        put_masks(self._setting, self._trial, found, counts.watch)
        try:
            yield counts
        finally:
            self._trial.clear()


@contextmanager
def trials(setting: Setting, costs: CostModel, selection: np.ndarray, clock: Clock) -> Iterator[Trials]:
    """Try candidates out while this context lasts; the model is as before afterwards."""
    with trial_masks(setting.blocks) as trial:
        yield Trials(setting, trial, costs, selection, clock)


Watch = Callable[[int, str, torch.Tensor], None]
"""Gets layer, site, and which entries are not zero behind the mask, bool `[..., channels]`."""


def put_masks(setting: Setting, trial: Trial, found: Found, watch: Watch) -> None:
    """Put a candidate's masks on trial, and watch every site that has zeros, those of the model's own too."""
    present = sparsity_of(setting.model)
    own = {
        (block.index, site)
        for block in setting.blocks
        for site in (*block.projections(), "neuron")
        if present.at(site, block.index)
    }
    for place in find_places(setting.blocks, ActivationSparsity(found.sparsifiers)):
        tensors = placed(found.tensors_at(place), place)
        selection = Selection(_as_selection(place.sparsifier), tensors, TokenPositions())
        correction = selection.correction if selection.low_rank_in is not None else None
        for sites in _groups(place.block, place.sites()):
            mask = _watched(selection, watch, place.block.index, sites)
            trial.put(place.block.index, sites[0], mask, correction)
            own -= {(place.block.index, site) for site in sites}
    for block in setting.blocks:
        for sites in _groups(block, [site for layer, site in own if layer == block.index]):
            trial.put(block.index, sites[0], _watching(watch, block.index, sites))


def _groups(block: BlockSites, sites: Sequence[str]) -> list[tuple[str, ...]]:
    """Return sites by what serves them: one mask on trial is behind all sites of a fused projection."""
    groups = [tuple(site for site in group if site in sites) for group in (*block.groups(), ("neuron",))]
    return [group for group in groups if group]


def _as_selection(sparsifier: Sparsifier) -> Sparsifier:
    """A FATReLU, on what a ReLU lets pass, is a threshold."""
    if sparsifier.function != "fatrelu":
        return sparsifier
    return Sparsifier(("neuron",), "threshold", threshold=sparsifier.threshold)


def _watched(selection: Selection, watch: Watch, layer: int, sites: Sequence[str]) -> Mask:
    def mask(x: torch.Tensor) -> torch.Tensor:
        keeps = selection.keeps(x)
        background = torch.zeros_like(x) if selection.centre is None else selection.centre.to(x.dtype)
        for site in sites:
            watch(layer, site, keeps if selection.centre is not None else keeps & (x != 0))
        return torch.where(keeps, x, background)

    return mask


def _watching(watch: Watch, layer: int, sites: Sequence[str]) -> Mask:
    def mask(x: torch.Tensor) -> torch.Tensor:
        for site in sites:
            watch(layer, site, x != 0)
        return x

    return mask


class _Counts:
    """Adds up which shares pass the masks, over tokens; a window's first is none that is decoded."""

    def __init__(self, costs: CostModel) -> None:
        self._speeds = costs.speeds
        self._listed: dict[tuple[int, str], float] = {}
        self._read: dict[tuple[int, str], float] = {}
        self._tokens: dict[tuple[int, str], int] = {}

    def watch(self, layer: int, site: str, passes: torch.Tensor) -> None:
        shares = (passes[:, 1:] if passes.ndim == 3 else passes).float().mean(-1)
        read = self._speeds.read_share("rows" if site == "neuron" else "columns", shares)
        key = layer, site
        self._listed[key] = self._listed.get(key, 0.0) + float(shares.sum())
        self._read[key] = self._read.get(key, 0.0) + float(read.sum())
        self._tokens[key] = self._tokens.get(key, 0) + shares.numel()

    def shares(self) -> Shares:
        listed, read = (
            {key: total / self._tokens[key] for key, total in totals.items()}
            for totals in (self._listed, self._read)
        )
        return Shares(listed, read)


def _few_windows(setting: Setting) -> np.ndarray:
    windows = setting.windows
    assert windows is not None
    vocabulary = setting.model.config.vocab_size
    count = min(KL_TOKENS, KL_NUMBERS // vocabulary) // windows.shape[1]
    return windows[:: max(1, len(windows) // max(1, count))][: max(1, count)]
