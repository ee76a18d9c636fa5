"""The L1 penalty on activations, and its strength at every step (ProSparse, arXiv 2402.13516, section 3.2).

Hooks collect one number per layer while the model runs. What gradient checkpointing computes again calls them
again: autograd wants to see the same operations, whose results are then dropped. Which of the two it is shows
in whether the stack of blocks is running, since only its blocks are computed again.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from relufy.errors import UserError
from relufy.model.structure import find_blocks, stack_name
from relufy.processes import sum_over_processes
from relufy.recipe import Penalty
from relufy.train.controller import DensityController


class SparsityPenalty(ABC):
    """The penalty's term, `sum over places of mean over tokens of |a|`, and its strength.

    It looks at forward passes of the model in training mode that record gradients, so not at evaluation.
    Places are found by module, so they stay right when the model is wrapped afterwards (peft, DDP, FSDP2).
    """

    def __init__(self, model: nn.Module, penalty: Penalty, steps: int) -> None:
        self.penalty = penalty
        self.steps = steps
        self._blocks = find_blocks(model)
        self._stack = model.get_submodule(stack_name(self._blocks))
        self._num_places = 0
        self._controller = None if penalty.target is None else DensityController(penalty.target, steps)
        self._taken = 0
        self._is_running = False
        self._layers: list[torch.Tensor] = []
        self._densities: list[torch.Tensor] = []
        self._seen: list[torch.Tensor] = []
        """Density and term of each forward pass since the last step, where a controller wants them."""

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Look at the model's forward passes, and at their recomputation, while this context lasts."""
        with ExitStack() as hooks:
            hooks.callback(self._stack.register_forward_pre_hook(self._begin).remove)
            hooks.callback(self._stack.register_forward_hook(self._end, always_call=True).remove)
            for handle in self._attach():
                hooks.callback(handle.remove)
            yield

    @abstractmethod
    def _attach(self) -> Iterator[RemovableHandle]:
        """Put hooks on the places: each forward pass calls `_penalise` and `_count_active` once for each."""

    def term(self) -> torch.Tensor:
        """Return the term of the forward pass just run, a scalar in float32, and forget it."""
        if not 0 < len(self._layers) == self._num_places:
            raise RuntimeError("no forward pass in training mode, with gradients, since the last term")
        layers, self._layers = self._layers, []
        term = torch.stack([layer.to(layers[0].device) for layer in layers]).sum()
        if self._controller is not None:
            densities = torch.stack([density.to(layers[0].device) for density in self._densities])
            self._seen.append(torch.stack([densities.mean(), term.detach()]))
        return term

    def strength(self) -> torch.Tensor:
        """Return the strength for the step about to be taken, a scalar on the device."""
        found = None if self._controller is None else self._controller.strength()
        if found is not None:
            return found
        value = 0.0 if self._controller is not None else schedule(self.penalty, self._taken, self.steps)
        return torch.full((), value, device=self._device())

    def after_step(self, step: int) -> None:
        """Go on to the next step, `step` being taken; with a target, all processes must call this."""
        self._taken = step
        if self._controller is None:
            return
        assert self._seen, "a step without a forward pass"
        seen, self._seen = torch.stack(self._seen), []
        count = torch.full_like(seen[0, :1], len(seen))
        density, term, total = sum_over_processes(torch.cat([seen.sum(0), count])).unbind()
        self._controller.look(density / total, term / total, self._progress())

    def metrics(self) -> dict[str, float]:
        """Return what a report can say of the way to the target: the sparsity wanted now and found. Waits."""
        controller = self._controller
        wanted = controller and controller.wanted_density(self._progress())
        if controller is None or wanted is None:
            return {}
        wanted, found = torch.stack([wanted, controller.measured_density()]).tolist()  # type: ignore[list-item]
        return {
            "target_sparsity": controller.target,
            "wanted_sparsity": 1 - wanted,
            "found_sparsity": 1 - found,
        }

    def state(self) -> dict[str, float]:
        """Return all that a resumed run must know, between two steps."""
        controlled = {} if self._controller is None else self._controller.state
        return {"step": float(self._taken)} | {name: value.item() for name, value in controlled.items()}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Go on from what `state` returned."""
        self._taken = int(state["step"])
        if self._controller is not None:
            self._controller.state = {
                name: torch.full((), value, device=self._device())
                for name, value in state.items()
                if name != "step"
            }

    def _progress(self) -> float:
        return schedule(self.penalty, self._taken, self.steps)

    def _device(self) -> torch.device:
        return next(self._stack.parameters()).device

    def _begin(self, stack: nn.Module, _args: Any) -> None:
        self._is_running = stack.training and torch.is_grad_enabled()
        if self._is_running:
            self._layers, self._densities = [], []

    def _end(self, *_: Any) -> None:
        self._is_running = False

    def _penalise(self, values: torch.Tensor) -> None:
        if self._is_running and not torch.is_grad_enabled():
            raise UserError(
                "a penalty on activations needs gradient checkpointing without use_reentrant; set it to False"
            )
        if torch.is_grad_enabled():
            magnitude = mean_magnitude(values, self.penalty.over_neurons)
            if self._is_running:
                self._layers.append(magnitude)

    def _count_active(self, values: torch.Tensor) -> None:
        if self._is_running and self._controller is not None:
            self._densities.append((values.detach() != 0).sum() / values.numel())


class NeuronPenalty(SparsityPenalty):
    """On what `down` reads; what is steered are the zeros of the activation."""

    def __init__(self, model: nn.Module, penalty: Penalty, steps: int) -> None:
        super().__init__(model, penalty, steps)
        self._num_places = len(self._blocks)

    def _attach(self) -> Iterator[RemovableHandle]:
        for block in self._blocks:
            yield block.down.module.register_forward_pre_hook(lambda _module, args: self._penalise(args[0]))
            yield block.activation.module.register_forward_hook(
                lambda _module, _args, output: self._count_active(output)  # type: ignore[arg-type]
            )


def mean_magnitude(values: torch.Tensor, over_neurons: str) -> torch.Tensor:
    """Return the mean over tokens of |values|, `[..., neurons]`, as a float32 scalar."""
    tokens = values.numel() // values.shape[-1]
    return values.abs().sum(dtype=torch.float32) / (values.numel() if over_neurons == "mean" else tokens)


def schedule(penalty: Penalty, step: float, steps: int) -> float:
    """Return the strength after so many steps of a run, or with a target the share of the way to it."""
    ends = [until / penalty.until[-1] * steps for until in penalty.until]
    if step <= ends[0]:
        return penalty.strength[0]
    for (start, end), (before, after) in zip(pairwise(ends), pairwise(penalty.strength), strict=True):
        if step <= end:
            share = (math.sin(math.pi * ((step - start) / (end - start) - 0.5)) + 1) / 2
            return before + share * (after - before)
    return penalty.strength[-1]
