"""One pass over a text that counts everything at once: zeros, neurons, unions, hidden states, losses.

It takes batches while they come and keeps counts alone, so memory does not grow with the text. Run by several
processes (torchrun), each takes its batches in turn; what they counted is added up in whole numbers, so that
nothing depends on their number.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from relufy.measure.batches import Batch
from relufy.measure.definitions import ZeroSparsities, zero_sparsities
from relufy.measure.hidden import HiddenCounts, HiddenPeaks
from relufy.measure.losses import LossCounts
from relufy.measure.neurons import NeuronActivity, NeuronCounts
from relufy.measure.preactivations import PreActivationCounts, PreActivations
from relufy.measure.quality import Perplexity, evaluating
from relufy.measure.unions import UnionCounts, Unions
from relufy.measure.zero_counts import SiteZeros, ZeroCounts
from relufy.model.configuration import sparse_sites
from relufy.model.observe import observe_sites

Progress = Callable[[str, int, int], None]
"""Called with what is done, how many windows are, and how many there will be (0: not known)."""


@dataclass(frozen=True)
class Counted:
    """What a pass over a text found, in all processes."""

    tokens: int
    windows: int
    window: int
    """Tokens in a window, the longest where they differ."""
    sites: dict[str, SiteZeros]
    zeros: ZeroSparsities
    neurons: dict[str, NeuronActivity]
    unions: Unions
    hidden: HiddenPeaks
    preactivations: PreActivations
    perplexity: Perplexity
    dense_perplexity: Perplexity | None


class CountingPass:
    """Everything that is counted of a model, and of the dense one its losses, if there is one."""

    def __init__(self, model: PreTrainedModel, dense: PreTrainedModel | None = None) -> None:
        self._model, self._dense = model, dense
        self._zeros = ZeroCounts(model)
        self._neurons = NeuronCounts(self._zeros.widths)
        self._unions = UnionCounts(self._zeros.widths, {*sparse_sites(model), "down"})
        self._hidden = HiddenCounts(model)
        self._preactivations = PreActivationCounts(model)
        self._losses, self._dense_losses = LossCounts(), LossCounts()
        self._batch: Batch | None = None

    def run(self, batches: Iterable[Batch], progress: Progress, wanted: int = 0) -> Counted:
        """Run this process's batches and return what all processes found; all of them must call this."""
        models = [self._model, *([self._dense] if self._dense else [])]
        with ExitStack() as hooks, evaluating(*models):
            hooks.enter_context(observe_sites(self._model, self._see_zeros, masks=self._see_masks))
            self._hidden.attach(hooks)
            self._preactivations.attach(hooks)
            for batch in batches:
                self._run_batch(batch)
                progress("windows", batch.first + len(batch.lengths), wanted)
        return self._collect()

    def _run_batch(self, batch: Batch) -> None:
        self._batch = batch
        for counts in (self._unions, self._hidden, self._preactivations):
            counts.begin(batch)
        logits = logits_of(self._model, batch)
        self._batch = None
        for counts in (self._zeros, self._neurons, self._unions, self._hidden, self._preactivations):
            counts.end()
        self._losses.add(batch, logits)
        if self._dense is not None:
            self._dense_losses.add(batch, logits_of(self._dense, batch))

    def _see_zeros(self, site: str, layer: int, zeros: torch.Tensor) -> None:
        if self._batch is not None:
            self._zeros.add(site, layer, zeros, self._batch)

    def _see_masks(self, site: str, layer: int, is_zero: torch.Tensor) -> None:
        if self._batch is not None:
            self._neurons.add(site, layer, is_zero, self._batch)
            self._unions.add(site, layer, is_zero, self._batch)

    def _collect(self) -> Counted:
        zeros, losses = self._zeros.collect(), self._losses.collect()
        return Counted(
            tokens=zeros.tokens,
            windows=len(losses.per_window),
            window=losses.longest,
            sites={site: zeros.site(site) for site in self._zeros.sites},
            zeros=zero_sparsities(zeros),
            neurons=self._neurons.collect(zeros),
            unions=self._unions.collect(),
            hidden=self._hidden.collect(),
            preactivations=self._preactivations.collect(zeros.tokens),
            perplexity=losses.perplexity(),
            dense_perplexity=self._dense_losses.collect().perplexity() if self._dense is not None else None,
        )


def logits_of(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Return the logits of a batch, `[windows, longest, vocab]`; a batch without padding needs no mask."""
    device = model.device
    mask = {"attention_mask": batch.mask(device).long()} if batch.is_padded else {}
    return model(input_ids=batch.ids.to(device), use_cache=False, **mask).logits
