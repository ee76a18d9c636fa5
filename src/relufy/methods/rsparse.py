"""R-Sparse: thresholds at the inputs, and a low-rank branch for what they leave out (Zhang et al., arXiv
2504.19449, ICLR 2025).

    y = s(x) W^T + (x - s(x)) (A_r B_r)^T,   A_r B_r the truncated singular value decomposition of W

A budget of (1 - sparsity) of the weights of a projection is split: a share `channels` (the paper's alpha) of
it is columns, which the kept inputs read, the rest is the branch, of rank r. Where there is a branch, inputs
are compared by `|x_i| * norm(W[:, i])`, else by `|x_i|`. The split of each projection is found by an
evolution on the loss of calibration text (section 4.3). Ranks come of a projection's true shape, also with
grouped queries; a branch of rank 1 or less would cost more than it gives, so the channels get its budget.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from relufy.activation_sparsity import LOW_RANK, Sparsifier
from relufy.measure.quality import perplexity
from relufy.measure.sketch import Sketch
from relufy.method import RSparse
from relufy.methods.calibrate import Probe, collect
from relufy.methods.evolution import evolve
from relufy.methods.inputs import column_norms, maskable_groups, masks_by_threshold, same_tensor
from relufy.methods.setting import Found, Setting
from relufy.model.selections import Selection, TokenPositions
from relufy.model.structure import Projection
from relufy.model.trial import Trial, trial_masks

Place = tuple[int, tuple[str, ...]]
"""A layer, and the sites of one of its projections."""
Splits = Mapping[Place, float]
"""The share of the budget that goes to channels."""


@dataclass(frozen=True)
class Budget:
    """What a projection may read of its weights: `channels` columns of W, a branch of `rank` (0: none)."""

    channels: int
    rank: int
    sparsity: float
    """The share of inputs that the threshold leaves out."""

    def weights(self, outputs: int, inputs: int) -> int:
        """Return how many weights are read."""
        return self.channels * outputs + self.rank * (inputs + outputs)


def budget(outputs: int, inputs: int, sparsity: float, channels: float) -> Budget:
    """Return how (1 - sparsity) of a projection's weights is spent, given the share for channels."""
    rank = int((1 - sparsity) * (1 - channels) * inputs * outputs / (inputs + outputs))
    if rank <= 1:
        channels, rank = 1.0, 0
    return Budget(int(inputs * (1 - sparsity) * channels), rank, 1 - (1 - sparsity) * channels)


def low_rank(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors `[rank, in]` and `[out, rank]`, f32, of the best approximation of a weight, f64
    `[out, in]`."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return right[:rank].float(), (left[:, :rank] * values[:rank]).float()


def rsparse(method: RSparse, setting: Setting) -> Found:
    """Return thresholds for every projection's input, and low-rank branches where the split has them."""
    windows = setting.text("rsparse")
    calibrated = _Calibrated(method, setting)
    collected = collect(setting, windows, calibrated.probes, "calibrating")
    splits, notes = dict.fromkeys(calibrated.places, method.channels), [collected.note()]
    if method.search:
        splits, note = _search(method, setting, _spread(windows, method.windows), calibrated)
        notes.append(note)
    sparsifiers, tensors = [], {}
    for block in setting.blocks:
        plain = {}
        for group in maskable_groups(setting, block):
            selection = calibrated.selection((block.index, group), splits[block.index, group])
            if selection.definition.correction:
                sparsifiers.append(selection.definition)
                tensors |= {(block.index, group[0], name): t for name, t in selection.named_buffers()}
            else:
                plain[group] = selection.definition.threshold or 0.0
        sparsifiers += masks_by_threshold(block, plain)
    return Found(tuple(sparsifiers), tensors, tuple(filter(None, notes)))


class _Calibrated:
    """Gives the mask and the branch of any projection for any split of its budget."""

    def __init__(self, method: RSparse, setting: Setting) -> None:
        self._sparsity = method.sparsity
        self._projections = {
            (block.index, group): block.projections()[group[0]]
            for block in setting.blocks
            for group in maskable_groups(setting, block)
        }
        self._firsts = {place: same_tensor(setting.blocks[place[0]])[place[1][0]] for place in self.places}
        self._magnitudes = {(layer, self._firsts[layer, group]): Sketch() for layer, group in self.places}
        has_branches = method.search or method.channels < 1
        self._norms = {p: column_norms(self._projections[p]) for p in self.places} if has_branches else {}
        self._scores = {place: Sketch() for place in self._norms}
        self.factors = functools.cache(self._factors)

    @property
    def places(self) -> list[Place]:
        return list(self._projections)

    @property
    def probes(self) -> list[Probe]:
        """Return what the sketches ask for."""
        magnitudes = [Probe(layer, site, sketch.add) for (layer, site), sketch in self._magnitudes.items()]
        return magnitudes + [
            Probe(layer, group[0], _scores_to(sketch, self._norms[layer, group]))
            for (layer, group), sketch in self._scores.items()
        ]

    def budget(self, place: Place, channels: float) -> Budget:
        return budget(*self._projections[place].shape, self._sparsity, channels)

    def selection(self, place: Place, channels: float) -> Selection:
        """Return the mask of a projection's input, with its branch where that has anything to stand in for:
        not where enough of the inputs are zeros by themselves."""
        (layer, group), spent = place, self.budget(place, channels)
        if not spent.rank:
            threshold = _cut(self._magnitudes[layer, self._firsts[place]], spent.sparsity)
            return Selection(
                Sparsifier(group, "threshold", threshold=threshold, layers=(layer,)), {}, TokenPositions()
            )
        threshold = _cut(self._scores[place], spent.sparsity)
        if threshold == 0:
            return self.selection(place, 1.0)
        inner, outer = self.factors(place)
        definition = Sparsifier(
            group,
            "threshold",
            threshold=threshold,
            per_channel=("weight",),
            correction=LOW_RANK,
            layers=(layer,),
        )
        tensors = {
            "weight": self._norms[place],
            "low_rank_in": inner[: spent.rank],
            "low_rank_out": outer[:, : spent.rank],
        }
        return Selection(definition, tensors, TokenPositions())

    def _factors(self, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors of the greatest rank that the budget allows."""
        projection: Projection = self._projections[place]
        return low_rank(projection.matrix().double(), self.budget(place, 0.0).rank)


def _search(
    method: RSparse, setting: Setting, windows: np.ndarray, calibrated: _Calibrated
) -> tuple[dict[Place, float], str]:
    """Return the splits of the least loss on windows that evolution finds, and a line about it.

    It begins with channels alone, so that it never ends worse than thresholds on this text.
    """
    with trial_masks(setting.blocks) as trial:
        loss = functools.partial(_loss, setting, windows, calibrated, trial)
        uniform = [dict.fromkeys(calibrated.places, share) for share in (1.0, method.channels)]
        starts = [(loss(splits), splits) for splits in uniform[: 2 if method.channels < 1 else 1]]
        before = starts[0][0]
        splits, after = evolve(
            starts,
            loss,
            method.population,
            method.generations,
            setting.calibration.seed,
            lambda done, total: setting.progress("searching splits", done, total),
        )
    num_branches = sum(bool(calibrated.selection(*pair).definition.correction) for pair in splits.items())
    note = (
        f"{num_branches} of {len(splits)} projections have a low-rank branch; the loss on the search's text "
        f"is {after:.4f} nats, {before:.4f} with thresholds alone"
    )
    return splits, note


def _loss(
    setting: Setting, windows: np.ndarray, calibrated: _Calibrated, trial: Trial, splits: Splits
) -> float:
    for place, channels in splits.items():
        selection = calibrated.selection(place, channels)
        correction = selection.correction if selection.definition.correction else None
        trial.put(place[0], place[1][0], selection, correction)
    return perplexity(setting.model, windows, setting.calibration.batch_size).nats_per_token


def _spread(windows: np.ndarray, count: int) -> np.ndarray:
    """Return so many windows, evenly spread over all."""
    return windows[np.linspace(0, len(windows) - 1, min(count, len(windows)), dtype=np.int64)]


def _cut(sketch: Sketch, share: float) -> float:
    """Return the threshold that leaves out a share; 0 if that is less than one of the counted values."""
    return sketch.quantile(share) if share * sketch.count >= 1 else 0.0


def _scores_to(sketch: Sketch, norms: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """Return what counts the scores of inputs `[positions, channels]`, in the arithmetic of Selection."""
    return lambda x: sketch.add(norms * x.float().abs())
