"""The model that is examined, the text it is examined on, and what several checks need to know of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from relufy.activation_sparsity import activation_name
from relufy.errors import UserError
from relufy.hub import context_length, model_folder, read_config
from relufy.measure.definitions import ZeroSparsities, measure_zeros
from relufy.measure.modes import Scored, WindowLosses, window_losses
from relufy.measure.preactivations import PreActivations, measure_preactivations
from relufy.measure.quality import refuse_other_vocabulary
from relufy.model.checkpoint import load_model, load_tokenizer
from relufy.model.configuration import sparsity_of
from relufy.model.empty import refuse_without_sites
from relufy.model.sites import find_sites
from relufy.model.structure import BlockSites
from relufy.text import refuse_long_windows
from relufy.text_sample import sample_windows

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Effort:
    """How much text the checks see. Half of the windows are fitted on, the others tested on."""

    windows: int = 16
    window: int = 256
    prompts: int = 8
    """Texts that are continued."""
    new_tokens: int = 64
    """That each is continued by."""
    levels: tuple[float, ...] = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    """Shares of neurons that the sweep leaves out."""
    batch_size: int = 8
    seed: int = 0


FULL = Effort()
QUICK = Effort(windows=8, window=128, prompts=4, new_tokens=32, levels=(0.5, 0.7, 0.9))


@dataclass(frozen=True)
class Patient:
    """A model and its text. `dense` is the model that it was made from, where that is known and here."""

    name: str
    folder: Path
    config: dict[str, Any]
    model: PreTrainedModel
    blocks: list[BlockSites]
    fit: np.ndarray
    """int64 `[windows, length]`: what thresholds and predictors are found on."""
    test: np.ndarray
    """int64 `[windows, length]`, of the same text: what is reported."""
    effort: Effort = FULL
    dense: PreTrainedModel | None = None
    progress: Progress = field(default=lambda task, done, total: None, repr=False)

    @property
    def kind(self) -> str:
        """The name of the architecture, for what cannot be checked on it."""
        return type(self.model).__name__

    @property
    def activation(self) -> str:
        """What the configuration or the module calls the MLP's activation."""
        own = sparsity_of(self.model).at("neuron", 0)
        named = activation_name(self.config)
        return own.function if own else named or type(self.blocks[0].activation.module).__name__

    @cached_property
    def scored(self) -> Scored:
        return Scored("all", self.test.shape[1])

    @cached_property
    def _measured(self) -> tuple[ZeroSparsities, WindowLosses]:
        return measure_zeros(self.model, self.test, self.scored, self.effort.batch_size)

    @property
    def zeros(self) -> ZeroSparsities:
        """The exact zeros that the model makes by itself."""
        return self._measured[0]

    @property
    def losses(self) -> WindowLosses:
        """What the model loses on the test windows, as it is."""
        return self._measured[1]

    @cached_property
    def preactivations(self) -> PreActivations:
        return measure_preactivations(self.model, self.fit, self.effort.batch_size)

    def run(self) -> WindowLosses:
        """Return the losses on the test windows with whatever masks are being tried."""
        return window_losses(self.model, self.test, self.scored, self.effort.batch_size)

    def nats(self, losses: WindowLosses) -> tuple[float, float]:
        """Return how many nats a token costs more than without masks, and its paired standard error."""
        difference = losses.minus(self.losses)
        return difference.mean, difference.standard_error


def admit(
    model: str | Path,
    text: Sequence[str | Path],
    effort: Effort,
    progress: Progress = lambda task, done, total: None,
) -> Patient:
    """Load a model and draw its windows from all of the text. Raises UserError."""
    folder = model_folder(model)
    refuse_without_sites(folder)
    config = read_config(folder)
    refuse_long_windows(effort.window, context_length(config), "; give --window")
    windows = sample_windows(text, load_tokenizer(folder), effort.window, effort.windows, effort.seed)
    if len(windows) < 4:
        raise UserError(
            f"the text has {len(windows)} windows of {effort.window} tokens, the doctor needs 4 or more; "
            "give more text or a shorter --window"
        )
    loaded = load_model(folder)
    return Patient(
        name=str(model),
        folder=folder,
        config=config,
        model=loaded,
        blocks=find_sites(loaded),
        fit=windows[::2],
        test=windows[1::2],
        effort=effort,
        dense=_dense_of(config, loaded),
        progress=progress,
    )


def _dense_of(config: dict[str, Any], model: PreTrainedModel) -> PreTrainedModel | None:
    """Return the model that a checkpoint says it was made from, if that is here."""
    base = (config.get("activation_sparsity") or {}).get("provenance", {}).get("base")
    try:
        dense = load_model(model_folder(base)) if base else None
        if dense is not None:
            refuse_other_vocabulary(dense, model)
        return dense
    except (UserError, TypeError):
        return None
