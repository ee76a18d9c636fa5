"""The gamma-interval experiment: blocks of tokens that may only use neurons loaded before them (ReLU Strikes
Back, arXiv 2310.04564, section 5.1 and its figure of perplexity over gamma).

After a warm-up, blocks of gamma tokens take turns. In an open block every neuron may be used and those that
are active are loaded; in a frozen block the others are zeroed. The first block after the warm-up is open:

    loaded = {}
    for t, a in enumerate(activations):
        if t < warmup or (t - warmup) // gamma is even:  loaded |= {i: a_i != 0}
        else:                                            a_i = 0 for i not in loaded

`reset` empties `loaded` at the start of each open block after the warm-up (the paper leaves that open). Text
is given, not generated, and a layer's loaded set at a token depends on that layer's earlier tokens alone, so
one pass over a window computes it all. Beside it, random: at each frozen block, in each layer, as many
neurons as were loaded there, drawn from all.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from relufy.errors import UserError
from relufy.measure.modes import WindowLosses
from relufy.measure.neuron_masks import masked_neurons
from relufy.measure.quality import Difference, Perplexity, evaluating, log_likelihood
from relufy.measure.traces import NEURON_SITES, Windows, batches_of, check_site, run_windows

GAMMAS = (1, 2, 4, 8, 16, 32, 64)
WARMUP = 128
KINDS = ("reuse", "random")
DEFINITIONS = {
    "gamma": "perplexity on the tokens after the warm-up, every other block of gamma tokens using loaded "
    "neurons alone (ReLU Strikes Back, section 5.1)",
    "frozen_perplexity": "perplexity of what frozen tokens predict",
    "difference": "mean loss less the unlimited model's on the same tokens, nats, paired by window",
    "loaded_share": "share of neurons that a frozen token may use, a mean over its layers and tokens",
    "dropped_share": "share of a frozen token's active neurons that are zeroed, of all layers and tokens",
}


@dataclass(frozen=True)
class Blocks:
    """Which tokens are frozen, in windows of `length` tokens."""

    length: int
    gamma: int
    warmup: int = WARMUP
    reset: bool = False

    def is_frozen(self) -> np.ndarray:
        """Return bool `[length]`."""
        after = np.arange(self.length) - self.warmup
        return (after >= 0) & (after // self.gamma % 2 == 1)

    def since(self) -> np.ndarray:
        """Return from which token on a token's loaded neurons may have been active, `[length]`."""
        after = np.arange(self.length) - self.warmup
        first = self.warmup + after // (2 * self.gamma) * 2 * self.gamma
        return np.where((after >= 0) & self.reset, first, 0)

    def frozen_blocks(self) -> np.ndarray:
        """Return the first token of each frozen block."""
        frozen = self.is_frozen()
        return np.flatnonzero(frozen & (np.diff(frozen, prepend=False) | _starts(self)))


@dataclass(frozen=True)
class GammaPoint:
    """What one gamma made of the perplexity, with reused or with random neurons."""

    gamma: int
    kind: str
    """`reuse` or `random`."""
    perplexity: Perplexity
    difference: Difference
    frozen_perplexity: Perplexity
    frozen_difference: Difference
    loaded_share: float
    dropped_share: float


@dataclass(frozen=True)
class GammaInterval:
    """The experiment over several gammas, on `windows` windows; `perplexity` is the unlimited model's."""

    site: str
    warmup: int
    reset: bool
    windows: int
    perplexity: Perplexity
    points: tuple[GammaPoint, ...] = field(default=())

    def of(self, kind: str) -> tuple[GammaPoint, ...]:
        """Return the points of one kind, by gamma."""
        return tuple(point for point in self.points if point.kind == kind)

    def to_json(self) -> dict[str, Any]:
        """Return plain data, without each window's own perplexity."""
        plain = asdict(self)
        for found in (plain, *plain["points"]):
            for name in ("perplexity", "frozen_perplexity"):
                found.get(name, {}).pop("per_window", None)
        return plain


def gamma_interval(
    model: PreTrainedModel,
    windows: np.ndarray,
    gammas: Sequence[int] = GAMMAS,
    warmup: int = WARMUP,
    reset: bool = False,
    site: str = "neuron",
    batch_size: int = 16,
    seed: int = 0,
) -> GammaInterval:
    """Run the experiment on windows, int64 `[windows, length]`, teacher-forced: ReLU Strikes Back, 5.1.

    Raises UserError for windows without a token behind the first open block, and for a model none of whose
    neurons is ever zero (there would be nothing to load).
    """
    check_site(model, site, NEURON_SITES)
    length = windows.shape[1] - 1
    _check_gammas(gammas, warmup, length)
    blocks = {gamma: Blocks(length, gamma, warmup, reset) for gamma in gammas}
    sums = {(gamma, kind): _Sums(blocks[gamma]) for gamma in gammas for kind in ("plain", *KINDS)}
    is_sparse = False
    for batch in batches_of(windows, batch_size, model.config.vocab_size):
        plain = _losses(model, batch)
        for gamma in gammas:
            sums[gamma, "plain"].add(plain)
            run = _Interval(model, batch, blocks[gamma], site, seed)
            for kind in KINDS:
                sums[gamma, kind].add(run.losses(kind), run)
            is_sparse = is_sparse or run.active < run.neurons
    if not is_sparse:
        raise UserError(
            f"no entry of {site} is ever zero in this model, so all are loaded at once; make it sparse first "
            "(relufy sparsify --recipe relufy-stage1)"
        )
    points = [sums[g, kind].point(g, kind, sums[g, "plain"]) for kind in KINDS for g in gammas]
    unlimited = _perplexity(sums[gammas[0], "plain"].losses()[0])
    return GammaInterval(site, warmup, reset, len(windows), unlimited, tuple(points))


def loaded_before(active: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """Return which neurons are loaded at each token, the token's own among them if it is open.

    Bool `[windows, time, width]`, from what is active.
    """
    device = active.device
    is_open = torch.from_numpy(~blocks.is_frozen()).to(device)[:, None]
    since = torch.from_numpy(blocks.since()).to(device)[:, None]
    times = torch.arange(1, blocks.length + 1, dtype=torch.int32, device=device)[:, None]
    last = torch.where(active & is_open, times, 0).cummax(1).values
    return last > since


class _Interval:
    """One gamma on one batch: the pass that reuses, which tells how much the random one may load."""

    def __init__(self, model: PreTrainedModel, batch: Windows, blocks: Blocks, site: str, seed: int) -> None:
        self._model, self._batch, self._blocks, self._site, self._seed = model, batch, blocks, site, seed
        self._frozen = torch.from_numpy(blocks.is_frozen()).to(model.device)
        self._sizes: dict[int, torch.Tensor] = {}
        """Layer -> how many neurons are loaded at each frozen block, int64 `[windows, blocks]`."""
        self._begin()

    def losses(self, kind: str) -> torch.Tensor:
        """Return the losses of the pass with reused or random neurons, `[windows, length]`."""
        self._begin()
        mask = self._reuse if kind == "reuse" else self._random
        with masked_neurons(self._model, self._site, mask):
            return _losses(self._model, self._batch)

    def _begin(self) -> None:
        self.active = self.neurons = self.loaded = self.dropped = self.wanted = self.places = 0

    def _reuse(self, layer: int, values: torch.Tensor) -> torch.Tensor:
        shaped = values.reshape(len(self._batch.ids), self._blocks.length, -1)
        loaded = loaded_before(shaped != 0, self._blocks)
        first = torch.from_numpy(self._blocks.frozen_blocks()).to(values.device)
        self._sizes[layer] = loaded[:, first].sum(-1)
        return self._limited(shaped, loaded).reshape(values.shape)

    def _random(self, layer: int, values: torch.Tensor) -> torch.Tensor:
        shaped = values.reshape(len(self._batch.ids), self._blocks.length, -1)
        allowed = torch.ones_like(shaped, dtype=torch.bool)
        for window, sizes in enumerate(self._sizes[layer].tolist()):
            generator = np.random.default_rng((self._seed, self._batch.first + window, layer))
            for first, size in zip(self._blocks.frozen_blocks().tolist(), sizes, strict=True):
                drawn = np.zeros(shaped.shape[-1], dtype=bool)
                drawn[generator.choice(len(drawn), size, replace=False)] = True
                end = first + self._blocks.gamma
                allowed[window, first:end] = torch.from_numpy(drawn).to(allowed.device)
        return self._limited(shaped, allowed).reshape(values.shape)

    def _limited(self, values: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        """Return the values with what is not allowed in frozen tokens zeroed, and count."""
        frozen = self._frozen.to(values.device)[:, None]
        active = values != 0
        self.active += int(active.sum())
        self.neurons += active.numel()
        self.loaded += int((allowed & frozen).sum())
        self.places += int(frozen.sum()) * len(values) * values.shape[-1]
        self.wanted += int((active & frozen).sum())
        self.dropped += int((active & frozen & ~allowed).sum())
        return torch.where(allowed | ~frozen, values, 0)


class _Sums:
    """Each window's mean loss after the warm-up and on frozen tokens, and what was loaded and dropped."""

    def __init__(self, blocks: Blocks) -> None:
        self._after = np.arange(blocks.length) >= blocks.warmup
        self._frozen = blocks.is_frozen()
        self._means: list[tuple[float, float]] = []
        self._counts = np.zeros(4, dtype=np.int64)

    def add(self, losses: torch.Tensor, run: "_Interval | None" = None) -> None:
        """Add losses, `[windows, length]`, and the counts of the pass that they are of."""
        rows = losses.double().cpu().numpy()
        means = (rows[:, chosen].mean(1).tolist() for chosen in (self._after, self._frozen))
        self._means += list(zip(*means, strict=True))
        if run is not None:
            self._counts += (run.loaded, run.places, run.dropped, run.wanted)

    def losses(self) -> tuple[WindowLosses, WindowLosses]:
        """Return those after the warm-up, and those on frozen tokens."""
        columns = zip(*self._means, strict=True)
        counts = (int(chosen.sum()) * len(self._means) for chosen in (self._after, self._frozen))
        after, frozen = (WindowLosses(c, n) for c, n in zip(columns, counts, strict=True))
        return after, frozen

    def point(self, gamma: int, kind: str, plain: "_Sums") -> GammaPoint:
        (after, frozen), (plain_after, plain_frozen) = self.losses(), plain.losses()
        loaded, places, dropped, wanted = self._counts.tolist()
        return GammaPoint(
            gamma=gamma,
            kind=kind,
            perplexity=_perplexity(after),
            difference=after.minus(plain_after),
            frozen_perplexity=_perplexity(frozen),
            frozen_difference=frozen.minus(plain_frozen),
            loaded_share=loaded / places,
            dropped_share=dropped / max(wanted, 1),
        )


def _perplexity(losses: WindowLosses) -> Perplexity:
    return replace(losses.perplexity(), per_window=losses.per_window)


def _losses(model: PreTrainedModel, batch: Windows) -> torch.Tensor:
    """Return the loss of what each token but the last predicts, `[windows, length - 1]`."""
    with evaluating(model):
        shorter = Windows(batch.first, batch.ids[:, :-1], tuple(length - 1 for length in batch.lengths))
        logits = run_windows(model, shorter)
        return -log_likelihood(logits, batch.ids[:, 1:].to(logits.device))


def _starts(blocks: Blocks) -> np.ndarray:
    """Return where a block begins after the warm-up, bool `[length]`."""
    after = np.arange(blocks.length) - blocks.warmup
    return (after >= 0) & (after % blocks.gamma == 0)


def _check_gammas(gammas: Sequence[int], warmup: int, length: int) -> None:
    if not gammas or min(gammas) < 1 or warmup < 0:
        raise UserError(f"gammas are 1 or more and a warm-up is 0 or more, found {list(gammas)} and {warmup}")
    if warmup + max(gammas) >= length:
        raise UserError(
            f"with a warm-up of {warmup} and gamma {max(gammas)} no token of a window of {length + 1} is "
            "frozen; take longer windows, a shorter warm-up or a smaller gamma"
        )
