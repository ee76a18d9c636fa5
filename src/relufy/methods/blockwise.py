"""One block at a time: what it was called with, and how far masks move its output."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from relufy.measure.quality import evaluating
from relufy.methods.calibrate import counted_positions, hidden_states_of, run_stack
from relufy.methods.setting import Setting


@dataclass(frozen=True)
class Call:
    """What a block was called with, and which positions count: bool `[batch, time]`."""

    args: tuple
    kwargs: dict[str, Any]
    counts: torch.Tensor


class RecordedBlock:
    """A block with its calls of a few windows, and its outputs at the positions that count."""

    def __init__(self, module: nn.Module, calls: Sequence[Call]) -> None:
        self._module = module
        self._calls = calls
        self._outputs = [self._run(call) for call in calls]
        self._length = sum(float(output.square().sum()) for output in self._outputs)

    def error(self) -> float:
        """Return how far the block's output now is from the recorded one: squared distance over squared
        length, over all positions that count."""
        distance = 0.0
        for call, expected in zip(self._calls, self._outputs, strict=True):
            distance += float((self._run(call) - expected).square().sum())
        return distance / self._length

    def _run(self, call: Call) -> torch.Tensor:
        output = self._module(*call.args, **call.kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        return hidden[call.counts].float()


@contextmanager
def recorded_block(setting: Setting, windows: np.ndarray, layer: int) -> Iterator[RecordedBlock]:
    """Record the calls of one block on windows, and run it again as often as wanted.

    The blocks before it run as they are when this is called. Positions count as in `collect`.
    """
    module = setting.model.get_submodule(setting.blocks[layer].name)
    calls: list[Call] = []
    with evaluating(setting.model):
        handle = module.register_forward_pre_hook(_recorder(setting, calls), with_kwargs=True)
        try:
            for start in range(0, len(windows), setting.calibration.batch_size):
                _run_until_recorded(setting, windows[start : start + setting.calibration.batch_size])
        finally:
            handle.remove()
        yield RecordedBlock(module, calls)


class _Recorded(Exception):
    """Ends a forward pass at the block that was waited for."""


def _recorder(setting: Setting, calls: list[Call]) -> Callable[..., None]:
    def record(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = hidden_states_of(args, kwargs)
        counts, _massive = counted_positions(hidden, setting.calibration.keep_massive)
        calls.append(Call(args, kwargs, counts))
        raise _Recorded

    return record


def _run_until_recorded(setting: Setting, batch: np.ndarray) -> None:
    try:
        run_stack(setting, batch)
    except _Recorded:
        return
    raise AssertionError("the block was never called")
