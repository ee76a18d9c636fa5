"""The loss of each window, from the logits of a pass."""

import math
from dataclasses import dataclass

import torch

from relufy.measure.batches import Batch
from relufy.measure.quality import Perplexity, log_likelihood, mean_and_error
from relufy.processes import from_all


@dataclass(frozen=True)
class CollectedLosses:
    """Each window's mean loss, nats per predicted token, and its length, in the order of the text."""

    per_window: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def perplexity(self) -> Perplexity:
        """Return the perplexity: of the mean over predicted tokens, with its standard error over windows."""
        predicted = [length - 1 for length in self.lengths]
        if len(set(predicted)) == 1:
            nats, error = mean_and_error(self.per_window)
        else:
            nats, error = _weighted(self.per_window, predicted)
        return Perplexity(math.exp(min(nats, 700.0)), nats, error, sum(predicted), self.per_window)


class LossCounts:
    """Add the logits of each batch; a window's first token is only read."""

    def __init__(self) -> None:
        self._batches: list[tuple[int, tuple[float, ...], tuple[int, ...]]] = []

    def add(self, batch: Batch, logits: torch.Tensor) -> None:
        """Add a batch by its logits, `[windows, longest, vocab]`."""
        targets = batch.ids[:, 1:].to(logits.device)
        losses = -log_likelihood(logits[:, :-1], targets).double()
        if batch.is_padded:
            predicted = batch.mask(logits.device)[:, 1:]
            means = torch.where(predicted, losses, 0.0).sum(1) / predicted.sum(1)
        else:
            means = losses.mean(1)
        self._batches.append((batch.index, tuple(means.tolist()), batch.lengths))

    def collect(self) -> CollectedLosses:
        """Return the losses of all processes; all of them must call this."""
        everyone = sorted(batch for batches in from_all(self._batches) for batch in batches)
        losses = tuple(loss for _, means, _ in everyone for loss in means)
        return CollectedLosses(losses, tuple(length for _, _, lengths in everyone for length in lengths))


def _weighted(values: tuple[float, ...], weights: list[int]) -> tuple[float, float]:
    """Return the mean of windows of different lengths, and its standard error (that of a ratio)."""
    total, count = sum(weights), len(values)
    mean = math.fsum(w * value for w, value in zip(weights, values, strict=True)) / total
    squares = math.fsum((w * (value - mean)) ** 2 for w, value in zip(weights, values, strict=True))
    return mean, math.sqrt(squares * count / (count - 1)) / total
