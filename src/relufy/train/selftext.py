"""Text that the dense model writes for its own fine-tune, so that relufication needs no data.

Sampled from the model's own distribution (temperature 1, nothing cut off or penalised, whatever the
checkpoint's generation defaults say), since its own text weighs every prediction as the model itself does.
An end-of-sequence token does not end a window: the model writes on after it, as training text is packed.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, StaticCache

from relufy.errors import UserError
from relufy.files import cache_folder, replacing
from relufy.measure.quality import evaluating
from relufy.text import refuse_long_windows

FORMAT = 1
"""Raise it when the same arguments give other text."""
BATCH_BYTES = 512 * 2**20
"""Memory for the keys and values of the windows that are written side by side."""
MAX_BATCH = 256
ACCELERATOR_BATCHES = 16
"""How many times as much an accelerator takes."""

Progress = Callable[[int, int], None]
"""Called with the windows done and their number."""


def write_windows(
    model: PreTrainedModel,
    count: int,
    window: int,
    seed: int,
    bos: int | None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Return windows that the model wrote, int64 `[count, window]`, each opened by `bos`.

    The same model and arguments give the same text (on another machine rounding may change a few tokens); the
    global random state is neither used nor changed. Cached in the folder `selftext` of relufy's cache. Raises
    UserError if the model cannot write such windows.
    """
    _refuse_unfit(model, count, window, bos)
    assert bos is not None
    file = cache_folder() / "selftext" / f"{_key(model, count, window, seed, bos)}.npy"
    windows = _read_cached(file, (count, window))
    if windows is None:
        windows = _write(model, count, window, seed, bos, progress)
        with replacing(file) as temporary, temporary.open("wb") as stream:
            np.save(stream, windows)
    if progress is not None:
        progress(count, count)
    return windows


def _write(
    model: PreTrainedModel, count: int, window: int, seed: int, bos: int, progress: Progress | None
) -> np.ndarray:
    draws = np.random.default_rng(seed).random((count, window - 1))
    windows = np.empty((count, window), dtype=np.int64)
    batch = _batch_size(model, window)
    with evaluating(model):
        for start in range(0, count, batch):
            part = slice(start, min(start + batch, count))

            def on_token(written: int, part: slice = part) -> None:
                if progress is not None:
                    progress(part.start + (part.stop - part.start) * written // window, count)

            windows[part] = _write_batch(model, torch.from_numpy(draws[part]), bos, on_token)
    return windows


def _write_batch(
    model: PreTrainedModel, draws: torch.Tensor, bos: int, on_token: Callable[[int], None]
) -> np.ndarray:
    """Write windows side by side, one token each by each column of `draws` (uniform, `[batch, window - 1]`).

    A static cache, since a growing one is copied at every token.
    """
    batch, window = len(draws), draws.shape[1] + 1
    draws = draws.to(model.device)
    ids = torch.full((batch, window), bos, dtype=torch.long, device=model.device)
    cache = StaticCache(config=model.config, max_cache_len=window)
    for position in range(window - 1):
        last = ids[:, position : position + 1]
        logits = model(input_ids=last, past_key_values=cache, use_cache=True).logits[:, -1]
        ids[:, position + 1] = _sample(logits, draws[:, position])
        on_token(position + 1)
    return ids.cpu().numpy()


def _sample(logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Return a token for each row of logits `[batch, vocab]`: where its draw falls in the summed softmax."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    tokens = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return tokens.clamp_max(logits.shape[-1] - 1)


def _batch_size(model: PreTrainedModel, window: int) -> int:
    config = model.config
    per_window = 2 * config.num_hidden_layers * config.hidden_size * window * model.dtype.itemsize
    times = 1 if model.device.type == "cpu" else ACCELERATOR_BATCHES
    return max(1, min(times * MAX_BATCH, times * BATCH_BYTES // per_window))


def _refuse_unfit(model: PreTrainedModel, count: int, window: int, bos: int | None) -> None:
    if bos is None:
        raise UserError("the tokenizer has no beginning-of-sequence token to write from; give text files")
    if count < 1 or window < 2:
        raise UserError(f"expected at least 1 window of at least 2 tokens, found {count} of {window}")
    refuse_long_windows(window, getattr(model.config, "max_position_embeddings", None))


def _key(model: PreTrainedModel, *arguments: int) -> str:
    """Hash what decides the text: weights, configuration, the module tree (activations) and the arguments."""
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    digest = hashlib.sha256(json.dumps([FORMAT, arguments, config, repr(model)], default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _read_cached(file: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """Return the cached windows, or None if they are absent or damaged."""
    try:
        windows = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return windows if windows.shape == shape and windows.dtype == np.int64 else None
