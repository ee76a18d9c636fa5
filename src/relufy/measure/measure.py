"""`relufy.measure(model, text)`: the zeros of a model on a text, its quality, and what a token costs."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from relufy.activation_sparsity import BLOCK_KEY
from relufy.errors import UserError
from relufy.hub import context_length, model_folder
from relufy.measure.batches import Text, dealt_batches, windows_of
from relufy.measure.cost import Cost, Sparsity
from relufy.measure.costs import model_bytes, model_macs
from relufy.measure.counting_pass import CountingPass, Progress
from relufy.measure.measurement import Measurement
from relufy.measure.quality import refuse_other_vocabulary
from relufy.model.checkpoint import load_model, load_tokenizer
from relufy.model.configuration import sparsity_of
from relufy.processes import own_device
from relufy.text import TextWindows, refuse_long_windows

Model = str | Path | PreTrainedModel
PRECISIONS = {"f32": torch.float32, "bf16": torch.bfloat16}


def measure(
    model: Model,
    text: Text,
    dense: Model | None = None,
    window: int = 256,
    max_windows: int | None = None,
    batch_size: int = 16,
    *,
    tokenizer: Any = None,
    device: str | None = None,
    precision: str = "f32",
    progress: Progress = lambda task, done, total: None,
) -> Measurement:
    """Measure a model on a text, in one pass over it. Raises UserError.

    `model` is a checkpoint folder, "bundled", a hub id, or a loaded model, wherever its layers are. `text` is
    a file or several, cut into windows of `window` tokens, each opened by the tokenizer's
    beginning-of-sequence token if it has one; or windows of token ids: `[windows, length]`, an iterable of
    `[length]` each, of any lengths, or what a tokenizer returned with padding, which is never counted. It is
    streamed: memory does not grow with it. `max_windows` keeps the first ones.

    `dense` is the model to compare the perplexity with; by default the one that a checkpoint was made from,
    where its provenance names a folder that is still there. `bytes_engine` is at half a window of context,
    the mean over a window's positions (zeros are those of the unpacked model).

    A checkpoint is loaded in `precision` ("f32", "bf16") onto `device`: "cpu", "cuda", or "auto", which
    spreads its layers over all GPUs (and needs accelerate); by default this process's GPU if there is one.

    In processes that torchrun started and that have joined (`relufy.processes`), each measures its share, and
    all return what one would have.
    """
    load = partial(_load, device=device, precision=precision)
    loaded = load(model)
    if batch_size < 1:
        raise UserError(f"a batch has at least one window, found batch_size={batch_size}")
    windows = windows_of(text, lambda: tokenizer or _tokenizer(model), window)
    if isinstance(windows, TextWindows):
        refuse_long_windows(window, context_length(loaded.config.to_dict()))
    reference, dense_note = _dense_model(loaded, dense, load)
    counting = CountingPass(loaded, reference if reference is not loaded else None)
    batches = dealt_batches(windows, batch_size, loaded.config.vocab_size, max_windows)
    found = counting.run(batches, progress, max_windows or 0)
    bytes_engine, bytes_note = _bytes(loaded, found.zeros.sites, found.window // 2)
    if reference is loaded:
        found = replace(found, dense_perplexity=found.perplexity)
    return Measurement(
        **vars(found),
        model=str(model) if isinstance(model, str | Path) else loaded.name_or_path or type(loaded).__name__,
        macs_paper=model_macs(loaded, found.zeros.sites),
        bytes_engine=bytes_engine,
        context=found.window // 2,
        notes=tuple(filter(None, (bytes_note, dense_note, _phase_note(loaded), _left_out(windows)))),
    )


def _tokenizer(model: Model) -> Any:
    if not isinstance(model, str | Path):
        raise UserError("files are cut by a tokenizer: give the model's, or windows of token ids")
    return load_tokenizer(model)


def _bytes(model: PreTrainedModel, sparsity: Sparsity, context: int) -> tuple[dict[str, Cost] | None, str]:
    try:
        return model_bytes(model, sparsity, context), ""
    except UserError as error:
        return None, f"bytes_engine: {error}"


def _load(model: Model, device: str | None, precision: str) -> PreTrainedModel:
    if isinstance(model, PreTrainedModel):
        return model
    if precision not in PRECISIONS:
        raise UserError(f"precision is one of {', '.join(PRECISIONS)}, found {precision!r}")
    place = device or own_device()
    return load_model(model, PRECISIONS[precision], None if place == "cpu" else place)


def _dense_model(
    loaded: PreTrainedModel, dense: Model | None, load: Callable[[Model], PreTrainedModel]
) -> tuple[PreTrainedModel | None, str]:
    """Return the dense model to compare with, which may be the model itself, or None and the reason why."""
    if dense is not None:
        reference = load(dense)
        refuse_other_vocabulary(reference, loaded)
        return reference, ""
    block = getattr(loaded.config, BLOCK_KEY, None)
    if block is None:
        return loaded, ""
    base = block.get("provenance", {}).get("base") if isinstance(block, dict) else None
    if base is None:
        return None, "dense_perplexity: the checkpoint does not say what it was made from; name it as dense"
    try:
        folder = model_folder(base)
    except (UserError, TypeError):
        return None, f"dense_perplexity: the base model {base!r} is not here; name it as dense"
    return load(folder), ""


def _phase_note(model: PreTrainedModel) -> str:
    decoding = [sparsifier for sparsifier in sparsity_of(model).sparsifiers if sparsifier.phase == "decode"]
    sites = [site for sparsifier in decoding for site in sparsifier.sites]
    if not sites:
        return ""
    return (
        f"windows are read as prompts, which stay dense at {' '.join(sites)}: decoding reads less than this"
    )


def _left_out(windows: Any) -> str:
    count = windows.left_out if isinstance(windows, TextWindows) else 0
    return f"{count} tokens at the end of the text fill no window and were not measured" if count else ""
