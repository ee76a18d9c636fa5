"""How good a model is: perplexity on a text, and fidelity, its KL divergence from the dense model.

Both are means over the predicted positions of windows, in nats per token. A window's first token is input
only. Windows are the independent units, so standard errors are taken over windows, not over tokens.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from relufy.errors import UserError
from relufy.measure.statistics import Difference, difference_of_pairs, mean_and_error
from relufy.text import check_windows


@dataclass(frozen=True)
class Perplexity:
    """`perplexity` is exp(`nats_per_token`); `standard_error` is in nats (NaN for a single window)."""

    perplexity: float
    nats_per_token: float
    standard_error: float
    tokens: int
    per_window: tuple[float, ...] = field(default=(), repr=False)
    """Each window's own mean, in nats, for paired comparisons."""


@dataclass(frozen=True)
class Fidelity:
    """KL(dense || model), nats per token, and its standard error (NaN for a single window)."""

    kl: float
    standard_error: float
    tokens: int
    per_window: tuple[float, ...]
    """Each window's own mean, for paired comparisons."""


def perplexity(
    model: PreTrainedModel,
    windows: np.ndarray,
    batch_size: int = 16,
    on_windows: Callable[[int, int], None] = lambda _done, _all: None,
) -> Perplexity:
    """Return the perplexity on windows, int64 `[windows, length]`. Raises UserError if they are unfit.

    `on_windows` hears how many are done, of how many.
    """
    per_window = []
    with evaluating(model):
        for ids in _batches(windows, batch_size, model):
            losses = -log_likelihood(_predictions(model, ids), ids[:, 1:])
            per_window += losses.double().mean(1).tolist()
            on_windows(len(per_window), len(windows))
    nats, error = mean_and_error(per_window)
    return Perplexity(math.exp(nats), nats, error, windows[:, 1:].size, tuple(per_window))


def fidelity(
    dense: PreTrainedModel, model: PreTrainedModel, windows: np.ndarray, batch_size: int = 16
) -> Fidelity:
    """Return how far the model predicts from the dense model on windows, int64 `[windows, length]`.

    Raises UserError for unfit windows, and if the two have different vocabularies.
    """
    refuse_other_vocabulary(dense, model)
    per_window = []
    with evaluating(dense, model):
        for ids in _batches(windows, batch_size, model):
            expected = _predictions(dense, ids.to(dense.device)).to(ids.device)
            per_window += kl_divergence(expected, _predictions(model, ids)).double().mean(1).tolist()
    kl, error = mean_and_error(per_window)
    return Fidelity(kl, error, windows[:, 1:].size, tuple(per_window))


def paired_difference(first: Fidelity, second: Fidelity) -> Difference:
    """Return `first - second` with its paired standard error. Both must be of the same windows."""
    return difference_of_pairs(first.per_window, second.per_window)


def log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of `targets` `[...]` under `logits` `[..., vocab]`, f32."""
    chosen = logits.float().gather(-1, targets[..., None])[..., 0]
    return chosen - logits.float().logsumexp(-1)


def kl_divergence(dense_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return KL(dense || model) at every position, f32 `[...]`, from logits `[..., vocab]`."""
    expected, found = dense_logits.float().log_softmax(-1), logits.float().log_softmax(-1)
    return F.kl_div(found, expected, reduction="none", log_target=True).sum(-1)


@contextmanager
def evaluating(*models: PreTrainedModel) -> Iterator[None]:
    """Put models into eval mode and inference mode, and their training modes back afterwards."""
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def refuse_other_vocabulary(dense: PreTrainedModel, model: PreTrainedModel) -> None:
    """Raise UserError if the predictions of the two models cannot be compared."""
    sizes = dense.config.vocab_size, model.config.vocab_size
    if sizes[0] != sizes[1]:
        raise UserError(f"the dense model has {sizes[0]} tokens, this one {sizes[1]}; give its own original")


def _batches(windows: np.ndarray, batch_size: int, model: PreTrainedModel) -> Iterator[torch.Tensor]:
    check_windows(windows, model.config.vocab_size)
    for start in range(0, len(windows), batch_size):
        yield torch.from_numpy(windows[start : start + batch_size]).to(model.device)


def _predictions(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits for every token of the windows but the first, `[windows, length - 1, vocab]`."""
    return model(input_ids=ids, use_cache=False).logits[:, :-1]
