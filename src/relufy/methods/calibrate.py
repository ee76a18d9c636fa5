"""Running a text through a model, and handing what passes each site to whoever asked for it.

Nothing is kept here: probes keep sketches and sums, so memory does not grow with the text.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from relufy.errors import UserError
from relufy.measure.quality import evaluating
from relufy.methods.setting import Setting
from relufy.model.structure import BlockSites, stack_name

MASSIVE, MASSIVE_RATIO = 100.0, 1000.0
"""Sun et al., Massive Activations in Large Language Models (arXiv 2402.17762), section 2: above 100, and
above 1000 times the median magnitude of the hidden state."""

UP_OUTPUT = "up_output"
PRE_ACTIVATION = "pre_activation"
"""Places beside the sites: what the up projection returns, and what the activation gets."""


@dataclass(frozen=True)
class Probe:
    """Asks for what passes a site of a layer: `observe` gets it as `[positions, channels]`, many times.

    The sites are those of activation_sparsity.SITES, before any mask; UP_OUTPUT; and PRE_ACTIVATION.
    """

    layer: int
    site: str
    observe: Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class Collected:
    """How many positions were counted, and how many were massive, by layer."""

    positions: int
    massive: dict[int, int]

    def note(self) -> str:
        """Say what was counted and what was left out, in a line."""
        counted = f"calibrated on {self.positions:,} positions, without the first of each window"
        if not self.massive:
            return f"{counted}; none had massive activations"
        most, layers = max(self.massive.values()), f"layers {min(self.massive)} to {max(self.massive)}"
        return f"{counted} and without up to {most} with massive activations ({layers})"


def collect(setting: Setting, windows: np.ndarray, probes: Sequence[Probe], task: str) -> Collected:
    """Run the windows and show each probe what passes its site; nothing of the model changes.

    Left out are each window's first position and, unless the calibration keeps them, positions whose hidden
    state is massive where it enters the block. Raises UserError if an activation is no finite number.
    """
    run = _Run(setting.calibration.keep_massive)
    with ExitStack() as hooks, evaluating(setting.model):
        for block in setting.blocks:
            module = setting.model.get_submodule(block.name)
            hook = _block_hook(run, block.index)
            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for probe in probes:
            hooks.callback(_attach(run, setting.blocks[probe.layer], probe).remove)
        for start in range(0, len(windows), setting.calibration.batch_size):
            batch = windows[start : start + setting.calibration.batch_size]
            run_stack(setting, batch)
            run.positions += batch.shape[0] * (batch.shape[1] - 1)
            setting.progress(task, min(start + len(batch), len(windows)), len(windows))
    return Collected(run.positions, dict(run.massive))


def run_stack(setting: Setting, batch: np.ndarray) -> None:
    """Run windows through all blocks, without the head."""
    stack = setting.model.get_submodule(stack_name(setting.blocks))
    ids = torch.from_numpy(batch).to(setting.model.device)
    stack(input_ids=ids, use_cache=False)


def hidden_states_of(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the hidden states that a block was called with, `[batch, time, width]`."""
    return args[0] if args else kwargs["hidden_states"]


def is_massive(hidden: torch.Tensor) -> torch.Tensor:
    """Return which hidden states, `[..., width]`, hold a massive activation: bool `[...]`."""
    magnitude = hidden.float().abs()
    greatest = magnitude.amax(-1)
    return (greatest > MASSIVE) & (greatest > MASSIVE_RATIO * magnitude.median(-1).values)


def counted_positions(hidden: torch.Tensor, keep_massive: bool) -> tuple[torch.Tensor, int]:
    """Return which positions of a block's hidden states `[batch, time, width]` count, bool `[batch, time]`,
    and how many do not because they are massive."""
    counts = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    counts[:, 0] = False
    if keep_massive:
        return counts, 0
    massive = is_massive(hidden) & counts
    return counts & ~massive, int(massive.sum())


class _Run:
    """Which positions of the running block count."""

    def __init__(self, keep_massive: bool) -> None:
        self.keep_massive = keep_massive
        self.positions = 0
        self.massive: Counter[int] = Counter()
        self.counts = torch.zeros(0, dtype=torch.bool)

    def enter(self, layer: int, hidden: torch.Tensor) -> None:
        self.counts, massive = counted_positions(hidden, self.keep_massive)
        if massive:
            self.massive[layer] += massive

    def show(self, probe: Probe, values: torch.Tensor) -> None:
        rows = values.reshape(-1, values.shape[-1])[self.counts.flatten()]
        if not rows.isfinite().all():
            raise UserError(
                f"layer {probe.layer}: the activations at {probe.site!r} hold NaN or infinity, so there is "
                "nothing to calibrate on; check the checkpoint, or load it in float32"
            )
        probe.observe(rows)


def _block_hook(run: _Run, layer: int) -> Callable[..., None]:
    return lambda _module, args, kwargs: run.enter(layer, hidden_states_of(args, kwargs))


def _attach(run: _Run, block: BlockSites, probe: Probe) -> Any:
    if probe.site == "neuron":
        return block.activation.module.register_forward_hook(_output_hook(run, probe, _whole))
    if probe.site == UP_OUTPUT:
        part = _second_half if block.gate == block.up else _whole
        return block.up.module.register_forward_hook(_output_hook(run, probe, part))
    is_projection = probe.site != PRE_ACTIVATION
    module: nn.Module = block.projections()[probe.site].module if is_projection else block.activation.module
    return module.register_forward_pre_hook(lambda _module, args: run.show(probe, args[0]))


def _output_hook(
    run: _Run, probe: Probe, part: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[..., None]:
    return lambda _module, _args, output: run.show(probe, part(output))


def _whole(output: torch.Tensor) -> torch.Tensor:
    return output


def _second_half(output: torch.Tensor) -> torch.Tensor:
    """A fused gate and up: gate comes first."""
    return output.chunk(2, dim=-1)[1]
