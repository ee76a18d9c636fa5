"""Massive activations: the greatest hidden states where windows begin, beside those elsewhere and the median.

Trained decoders often put a few huge entries into the hidden state of their first token, an attention sink
(Sun et al., arXiv 2402.17762; Xiao et al., arXiv 2309.17453). Thresholds and sparsities of that token are not
those of the others, which is why both are reported apart.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from relufy.measure.batches import Batch
from relufy.measure.sketch import Sketch, merged
from relufy.model.structure import find_blocks
from relufy.processes import from_all

STRIDE = 16
"""The median is taken over every 16th token of a window, from its second on."""


@dataclass(frozen=True)
class HiddenPeaks:
    """The greatest |h| of any entry of the hidden states that a block puts out, one value per layer."""

    first_token: tuple[float, ...]
    first_percent: tuple[float, ...]
    rest: tuple[float, ...]
    """Behind the first percent; 0 where there is nothing."""
    median: tuple[float, ...]
    """The median of |h|, to 1 %, over every 16th token."""


class HiddenCounts:
    """Add each pass's hidden states, by hooks on the blocks."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._blocks = [model.get_submodule(block.name) for block in find_blocks(model)]
        self._peaks: list[Any] = [torch.zeros(3) for _ in self._blocks]
        self._magnitudes = [Sketch() for _ in self._blocks]
        self._batch: Batch | None = None

    def attach(self, hooks: ExitStack) -> None:
        """Hang the hooks, to be removed with the others."""
        for layer, block in enumerate(self._blocks):
            hooks.callback(block.register_forward_hook(partial(self._see, layer)).remove)

    def begin(self, batch: Batch) -> None:
        """Begin the pass of a batch."""
        self._batch = batch

    def end(self) -> None:
        """End the pass."""
        self._batch = None

    def collect(self) -> HiddenPeaks:
        """Return what all processes saw; all of them must call this."""
        everyone = from_all((torch.stack([peaks.cpu() for peaks in self._peaks]), self._magnitudes))
        peaks = torch.stack([peaks for peaks, _ in everyone]).amax(0)
        layers = zip(*(magnitudes for _, magnitudes in everyone), strict=True)
        medians = tuple(merged(parts).quantile(0.5) for parts in layers)
        first, opening, rest = (tuple(column) for column in peaks.T.tolist())
        return HiddenPeaks(first, opening, rest, medians)

    def _see(self, layer: int, _module: nn.Module, _args: tuple, output: Any) -> None:
        if (batch := self._batch) is None:
            return
        hidden = output[0] if isinstance(output, tuple) else output
        device = hidden.device
        greatest = hidden.detach().abs().amax(-1).float()
        greatest = greatest * batch.mask(device) if batch.is_padded else greatest
        opening = batch.opening(device)
        parts = greatest[:, 0], greatest * opening, greatest * ~opening
        found = torch.stack([part.amax() for part in parts])
        self._peaks[layer] = torch.maximum(self._peaks[layer].to(device), found)
        sampled = hidden[:, 1::STRIDE]
        self._magnitudes[layer].add(sampled[batch.mask(device)[:, 1::STRIDE]] if batch.is_padded else sampled)
