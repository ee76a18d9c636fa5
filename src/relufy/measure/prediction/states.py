"""What predictors learn from: a text's MLP inputs and neurons, streamed layer by layer and never kept."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from relufy.measure.quality import evaluating
from relufy.model.predicting import watching
from relufy.model.predictor import PredictedLayer
from relufy.model.structure import stack_name
from relufy.text import check_windows

SKIPPED = 1
"""A window's first position, an attention sink, is never counted: predictors leave it dense."""

Progress = Callable[[str, int, int], None]
"""Called with a task's name, what is done of it, and all of it."""


@dataclass(frozen=True)
class LayerStates:
    """A layer's states at some positions: `inputs` [positions, hidden], what the MLP's first projection
    reads; `neurons` [positions, neurons], what the activation returns. Both float32, outside of any graph."""

    layer: PredictedLayer
    inputs: torch.Tensor
    neurons: torch.Tensor

    @property
    def active(self) -> torch.Tensor:
        """Which neurons are active: bool [positions, neurons]."""
        return self.neurons != 0


def stream_states(
    model: PreTrainedModel,
    layers: Sequence[PredictedLayer],
    windows: np.ndarray,
    see: Callable[[LayerStates], None],
    task: str = "reading text",
    progress: Progress = lambda _task, _done, _all: None,
    batch_size: int = 8,
) -> int:
    """Run windows, int64 `[windows, length]`, through the model and show `see` the states of each layer.

    Returns the number of positions counted. Raises UserError for unfit windows.
    """
    check_windows(windows, model.config.vocab_size)
    stack = model.get_submodule(stack_name([layer.block for layer in layers]))
    with ExitStack() as hooks, evaluating(model):
        batch = _Batch(see)
        for layer in layers:
            hooks.enter_context(watching(layer, batch.read, batch.shown(layer)))
        for start in range(0, len(windows), batch_size):
            ids = torch.from_numpy(windows[start : start + batch_size]).to(model.device)
            batch.shape = ids.shape
            stack(input_ids=ids, use_cache=False)
            progress(task, min(start + batch_size, len(windows)), len(windows))
    return windows.shape[0] * (windows.shape[1] - SKIPPED)


class _Batch:
    """The inputs of the layer that is running."""

    def __init__(self, see: Callable[[LayerStates], None]) -> None:
        self._see = see
        self.shape = torch.Size((0, 0))
        self._inputs = torch.empty(0)

    def read(self, x: torch.Tensor) -> None:
        self._inputs = self._counted(x)

    def shown(self, layer: PredictedLayer) -> Callable[[torch.Tensor], None]:
        def neurons(output: torch.Tensor) -> None:
            self._see(LayerStates(layer, self._inputs, self._counted(output)))

        return neurons

    def _counted(self, values: torch.Tensor) -> torch.Tensor:
        rows = values.reshape(*self.shape, values.shape[-1])[:, SKIPPED:]
        return rows.reshape(-1, values.shape[-1]).float()
