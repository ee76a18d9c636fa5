"""Which entries of a site are active, token by token: what all measurements over time are made of.

A trace is what one layer did over the windows of one batch. It is shown to whoever asked while the model
runs and is then forgotten, so memory does not grow with the text. Everything counted from traces is a sum of
whole numbers, so it depends neither on how windows were batched nor on which process ran them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from relufy.errors import UserError
from relufy.measure.quality import evaluating
from relufy.model.observe import observe_sites
from relufy.model.structure import find_blocks
from relufy.schema import suggest
from relufy.text import check_windows

NEURON_SITES = ("neuron", "down")
"""Where an entry is a neuron: the activation's output, and (behind gate times up) what down reads."""


@dataclass(frozen=True)
class Trace:
    """The activity of one layer over windows: bool `[windows, time, width]`, False where there is no token.

    `first` is the number of the first window in the text, `lengths` the tokens of each. All windows' tokens
    are consecutive and begin at time 0.
    """

    layer: int
    first: int
    active: torch.Tensor
    lengths: tuple[int, ...]

    def is_token(self) -> torch.Tensor:
        """Return where there is a token, bool `[windows, time]`."""
        times = torch.arange(self.active.shape[1], device=self.active.device)
        return times < torch.tensor(self.lengths, device=self.active.device)[:, None]


@dataclass(frozen=True)
class Windows:
    """Windows that run together: int64 ids `[windows, longest]`, of `lengths` tokens each."""

    first: int
    ids: torch.Tensor
    lengths: tuple[int, ...]


Watch = Callable[[Trace], None]


def batches_of(
    windows: np.ndarray, batch_size: int, vocab_size: int, lengths: Sequence[int] | None = None
) -> Iterator[Windows]:
    """Yield windows, int64 `[windows, length]`, in batches; what is beyond a window's length is padding."""
    check_windows(windows, vocab_size)
    lengths = [windows.shape[1]] * len(windows) if lengths is None else lengths
    for start in range(0, len(windows), batch_size):
        end = start + batch_size
        yield Windows(start, torch.from_numpy(windows[start:end]), tuple(lengths[start:end]))


def watch_traces(
    model: PreTrainedModel, batches: Iterable[Windows], site: str, watch: Watch, skip: int = 0
) -> int:
    """Run batches of windows, show `watch` each layer's trace of each, and return the number of tokens.

    `skip` leaves out the first tokens of each window (an opening that the tokenizer adds is no text).
    Raises UserError for a site that the model does not have.
    """
    check_site(model, site)
    tokens = 0
    with evaluating(model):
        for batch in batches:
            tokens += sum(max(length - skip, 0) for length in batch.lengths)
            with _watching(model, site, batch, watch, skip):
                run_windows(model, batch)
    return tokens


def run_windows(model: PreTrainedModel, batch: Windows) -> torch.Tensor:
    """Run a batch without its padding being seen, and return the logits, `[windows, longest, vocab]`."""
    ids = batch.ids.to(model.device)
    if min(batch.lengths) == ids.shape[1]:
        return model(input_ids=ids, use_cache=False).logits
    mask = (torch.arange(ids.shape[1]) < torch.tensor(batch.lengths)[:, None]).long()
    return model(input_ids=ids, attention_mask=mask.to(model.device), use_cache=False).logits


def check_site(model: PreTrainedModel, site: str, sites: Sequence[str] = ()) -> None:
    """Raise UserError unless the model has this site, and it is one of `sites` where such are given."""
    known = [*find_blocks(model)[0].projections(), "neuron"]
    allowed = [name for name in known if not sites or name in sites]
    if site not in allowed:
        raise UserError(
            f"there is no site {site!r} here{suggest(site, allowed)}; choose among {', '.join(allowed)}"
        )


@contextmanager
def _watching(model: PreTrainedModel, site: str, batch: Windows, watch: Watch, skip: int) -> Iterator[None]:
    lengths = tuple(max(length - skip, 0) for length in batch.lengths)

    def see(name: str, layer: int, values: torch.Tensor) -> None:
        if name == site:
            active = values.reshape(*batch.ids.shape, -1)[:, skip:] != 0
            trace = Trace(layer, batch.first, active, lengths)
            if min(lengths) < active.shape[1]:
                active &= trace.is_token()[..., None]
            watch(trace)

    with observe_sites(model, values=see):
        yield
