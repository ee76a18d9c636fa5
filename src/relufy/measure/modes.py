"""Which tokens of a window are sparsified and scored, and the losses on them.

"all": every token. "second-half": the second half of each window, read in one pass behind a dense first half
(TEAL's harness). "decode": the first half is read as a prompt, then each token is fed by itself, with a
cache. The two last differ in how the tokens are computed, not in which.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from relufy.errors import UserError
from relufy.measure.quality import Difference, Perplexity, evaluating, log_likelihood, mean_and_error
from relufy.schema import suggest
from relufy.text import check_windows

MODES = ("all", "second-half", "decode")


class Scored:
    """The positions that count, for a mode and windows of a length: those from `first` on.

    `window_losses` tells it what each forward pass runs, so that masks and counters can ask which part of a
    tensor is meant.
    """

    def __init__(self, mode: str, length: int) -> None:
        if mode not in MODES:
            raise UserError(f"there is no mode {mode!r}{suggest(mode, list(MODES))}")
        if length < 4:
            raise UserError(f"windows need 4 tokens or more, found {length}")
        self.mode = mode
        self.first = 0 if mode == "all" else length // 2
        self._batch, self._start, self._count = 1, 0, 1

    def begin(self, batch: int, start: int, count: int) -> None:
        """Say that the next forward pass runs `count` tokens of `batch` windows, from a position on."""
        self._batch, self._start, self._count = batch, start, count

    @property
    def skipped(self) -> int:
        """How many of the running pass's tokens, its first ones, do not count."""
        return min(self._count, max(0, self.first - self._start))

    def split(self, values: torch.Tensor, trailing: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the part of a tensor that does not count, and the one that does: `[batch, time, ...]`.

        The last `trailing` dimensions are a token's own.
        """
        own = values.shape[values.ndim - trailing :]
        by_token = values.reshape(self._batch, self._count, *own)
        return by_token[:, : self.skipped], by_token[:, self.skipped :]


@dataclass(frozen=True)
class WindowLosses:
    """The mean loss of each window, nats per token, and the number of tokens that were scored."""

    per_window: tuple[float, ...]
    tokens: int

    def perplexity(self) -> Perplexity:
        nats, error = mean_and_error(self.per_window)
        return Perplexity(math.exp(min(nats, 700.0)), nats, error, self.tokens)

    def minus(self, other: "WindowLosses") -> Difference:
        """Return the difference with its standard error, paired by window."""
        pairs = zip(self.per_window, other.per_window, strict=True)
        return Difference(*mean_and_error([a - b for a, b in pairs]))


def window_losses(
    model: PreTrainedModel, windows: np.ndarray, scored: Scored, batch_size: int = 16
) -> WindowLosses:
    """Run windows, int64 `[windows, length]`, and return the loss on the tokens after those that count."""
    check_windows(windows, model.config.vocab_size)
    per_window: list[float] = []
    with evaluating(model):
        for start in range(0, len(windows), batch_size):
            ids = torch.from_numpy(windows[start : start + batch_size]).to(model.device)
            losses = torch.cat(list(_losses(model, ids, scored)), dim=1)
            per_window += losses.double().mean(1).tolist()
    return WindowLosses(tuple(per_window), len(windows) * (windows.shape[1] - 1 - scored.first))


def _losses(model: PreTrainedModel, ids: torch.Tensor, scored: Scored) -> Iterator[torch.Tensor]:
    """Yield losses `[batch, tokens]` of a batch of windows, in the order of the tokens."""
    if scored.mode != "decode":
        scored.begin(len(ids), 0, ids.shape[1] - 1)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[:, scored.first :]
        yield -log_likelihood(logits, ids[:, scored.first + 1 :])
        return
    scored.begin(len(ids), 0, scored.first)
    cache = model(input_ids=ids[:, : scored.first], use_cache=True, logits_to_keep=1).past_key_values
    for position in range(scored.first, ids.shape[1] - 1):
        scored.begin(len(ids), position, 1)
        last = ids[:, position : position + 1]
        found = model(input_ids=last, past_key_values=cache, use_cache=True)
        cache = found.past_key_values
        yield -log_likelihood(found.logits, ids[:, position + 1 : position + 2])
