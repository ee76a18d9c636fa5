"""Greedy sequential thresholds (Knunyants et al., arXiv 2501.16337, section 3), on any decoder.

From the first block to the last, projection after projection: its input's threshold is raised step by step
for as long as the loss on the calibration text grows by less than a factor; what is accepted stays, and the
next step is compared with it. So the whole loss grows by less than that factor to the power of the accepted
steps. A projection begins where most earlier ones of its kind ended.

The paper takes quantiles of each token and averages them; here they are of all positions of the dense model.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from relufy.measure.quality import perplexity
from relufy.method import GreedySequential
from relufy.methods.calibrate import collect
from relufy.methods.inputs import Group, InputSketches, maskable_groups, masks_by_threshold
from relufy.methods.setting import Found, Setting
from relufy.model.trial import keep_at_least, trial_masks


def greedy(method: GreedySequential, setting: Setting) -> Found:
    """Return thresholds of projections' inputs that keep the loss within the method's factor."""
    windows = setting.text("greedy")
    inputs = InputSketches(setting)
    collected = collect(setting, windows, inputs.probes(), "calibrating")
    places = [(block.index, g) for block in setting.blocks for g in maskable_groups(setting, block)]
    with trial_masks(setting.blocks) as trial:

        def put(layer: int, group: Group, share: float) -> None:
            threshold = inputs.threshold(layer, group, share)
            trial.put(layer, group[0], keep_at_least(threshold) if share else None)

        text = windows[: max(1, method.loss_tokens // windows.shape[1])]
        search = _Search(method, put, lambda: _loss(setting, text))
        for done, (layer, group) in enumerate(places, start=1):
            search.settle(layer, group)
            setting.progress("searching", done, len(places))
    sparsifiers = []
    for block in setting.blocks:
        shares = {group: share for (layer, group), share in search.shares.items() if layer == block.index}
        thresholds = {g: inputs.threshold(block.index, g, share) for g, share in shares.items()}
        sparsifiers += masks_by_threshold(block, thresholds)
    return Found(tuple(sparsifiers), notes=(collected.note(), search.note()))


@dataclass
class _Search:
    """The shares that were accepted, and the loss with them."""

    method: GreedySequential
    put: Callable[[int, Group, float], None]
    measure: Callable[[], float]
    shares: dict[tuple[int, Group], float] = field(default_factory=dict)
    accepted: int = 0

    def __post_init__(self) -> None:
        self.loss = self.first_loss = self.measure()

    def settle(self, layer: int, group: Group) -> None:
        """Find the share of one projection's input: up from where its kind begins, or else down."""
        last = int(self.method.sparsity / self.method.step + 1e-9)
        begin = min(self._usual(group), last)
        share = 0
        for tried in range(begin, last + 1):
            if not self._try(layer, group, tried):
                break
            share = tried
        for tried in range(begin - 1, 0, -1) if share == 0 else ():
            if self._try(layer, group, tried):
                share = tried
                break
        self.shares[layer, group] = share * self.method.step
        self.put(layer, group, self.shares[layer, group])

    def _try(self, layer: int, group: Group, steps: int) -> bool:
        self.put(layer, group, steps * self.method.step)
        loss = self.measure()
        if not loss < self.loss * self.method.loss_increase:
            return False
        self.loss = loss
        self.accepted += 1
        return True

    def _usual(self, group: Group) -> int:
        """Return the steps at which most projections of this kind ended; 1 where none did."""
        ended = [share for (_, other), share in self.shares.items() if other == group and share]
        return round(Counter(ended).most_common(1)[0][0] / self.method.step) if ended else 1

    def note(self) -> str:
        growth = 100 * (self.loss / self.first_loss - 1)
        return f"{self.accepted} accepted steps; the loss on the calibration text changed by {growth:+.2f} %"


def _loss(setting: Setting, windows: np.ndarray) -> float:
    return perplexity(setting.model, windows, setting.calibration.batch_size).nats_per_token
