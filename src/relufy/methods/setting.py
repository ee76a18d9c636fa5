"""What a method gets to work with, and what it returns."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel

from relufy.activation_sparsity import Sparsifier
from relufy.errors import UserError
from relufy.method import Calibration
from relufy.model.places import Place
from relufy.model.structure import BlockSites

T = TypeVar("T")

Progress = Callable[[str, int, int], None]
"""Called with a task's name, what is done of it, and all of it."""

LEAST_TOKENS = 512
"""Thresholds from less text than this are accidents."""


def no_progress(task: str, done: int, total: int) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Setting:
    """A model with its blocks, and the text to calibrate on."""

    model: PreTrainedModel
    blocks: list[BlockSites]
    windows: np.ndarray | None = None
    """Token ids, int64 `[windows, length]`, each window opened by the beginning-of-sequence token."""
    calibration: Calibration = field(default_factory=Calibration)
    progress: Progress = no_progress
    memory: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)
    """What methods keep for their next target (`remembered`)."""

    def remembered(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what was made for this key with this model and this text, or make it now."""
        place = (key, id(self.model), id(self.windows))
        if place not in self.memory:
            self.memory[place] = (make(), self.model, self.windows)  # kept, so that their ids stay theirs
        return self.memory[place][0]

    @property
    def is_gated(self) -> bool:
        return self.blocks[0].gate is not None

    def text(self, method: str) -> np.ndarray:
        """Return the calibration windows. Raises UserError if there are none, or too few."""
        if self.windows is None:
            raise UserError(f"{method} needs text to calibrate on; give it with --calibration FILE")
        positions = self.windows.shape[0] * (self.windows.shape[1] - 1)
        if positions < LEAST_TOKENS:
            raise UserError(
                f"the calibration text has {positions} positions, {method} needs {LEAST_TOKENS} or more"
            )
        return self.windows


@dataclass(frozen=True)
class Found:
    """What a method found for a model.

    `tensors` has the sparsifiers' tensors by (layer, a site of the sparsifier, name), where the name is one
    of threshold, weight, centre (f32 `[channels]`), low_rank_in `[rank, in]`, low_rank_out `[out, rank]`.
    """

    sparsifiers: tuple[Sparsifier, ...]
    tensors: Mapping[tuple[int, str, str], torch.Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What the user should know, in a line each."""

    def tensors_at(self, place: Place) -> dict[str, torch.Tensor]:
        """Return the tensors that a sparsifier needs where it is, by name."""
        return {
            name: tensor
            for (layer, site, name), tensor in self.tensors.items()
            if layer == place.block.index and site in place.sites() and name in place.tensors()
        }
