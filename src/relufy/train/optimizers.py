"""Which optimizer takes which parameter, and what the learning rate does over the steps.

Muon makes the momentum of a matrix orthogonal before it takes the step (K. Jordan 2024; Liu et al., arXiv
2502.16982). It is meant for the hidden matrices: embeddings, the head, norms and biases stay with AdamW. Its
updates are scaled to AdamW's usual size (section 2.2 there), so that one learning rate and one weight decay
serve both. A projection that is stored fused (q, k and v in one matrix) is one matrix to Muon too. Where FSDP
has split the matrices, they are put together for it, one at a time.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from relufy.errors import UserError
from relufy.model.kinds import block_lists
from relufy.recipe import Finetune

ADAM_BETAS = (0.9, 0.95)
"""A short memory of squared gradients, for short runs: it closed 91.1 % of the KL, 0.999 closed 90.6 %."""
MUON_MOMENTUM = 0.95

SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant_with_warmup",
    "wsd": "warmup_stable_decay",
}
"""What transformers calls our schedules."""

Parameters = list[nn.Parameter]


class InFloat32(TorchFunctionMode):
    """Computes in float32 what PyTorch's Muon does in bfloat16.

    On processors without arithmetic for bfloat16 that is two hundred times as fast.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)
        return func(*args, **(kwargs or {}))


def lacks_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 far more slowly than float32."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


class MuonWithAdamW(Optimizer):
    """Muon for `matrices` and AdamW for `others`, as one optimizer with the groups and the state of both.

    `others` are parameter groups; `matrices` are two-dimensional.
    """

    def __init__(
        self, matrices: Parameters, others: list[dict[str, Any]], learning_rate: float, weight_decay: float
    ) -> None:
        self._muon = torch.optim.Muon(
            matrices,
            lr=learning_rate,
            weight_decay=weight_decay,
            momentum=MUON_MOMENTUM,
            nesterov=True,
            adjust_lr_fn="match_rms_adamw",
        )
        self._adamw = AdamW(others, lr=learning_rate, betas=ADAM_BETAS)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {"lr": learning_rate})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step with both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Loading a state or a scheduler may have put others in their place.
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self._muon.state = self._adamw.state = self.state
        device = self.param_groups[0]["params"][0].device
        with InFloat32() if lacks_bfloat16(device) else nullcontext():
            self._muon.step()
        self._adamw.step()
        return loss


def make_optimizer(model: nn.Module, settings: Finetune) -> Optimizer:
    """Return the optimizer of the model's trainable parameters; weight decay is for matrices alone.

    Raises UserError where Muon cannot tell the hidden matrices.
    """
    matrices, vectors = split_parameters(model)
    if settings.optimizer == "adamw":
        groups = _groups(matrices, vectors, settings.weight_decay)
        return AdamW(groups, lr=settings.learning_rate, betas=ADAM_BETAS)
    hidden = hidden_matrices(model)
    known = {id(parameter) for parameter in hidden}
    rest = [parameter for parameter in matrices if id(parameter) not in known]
    others = _groups(rest, vectors, settings.weight_decay)
    return MuonWithAdamW(hidden, others, settings.learning_rate, settings.weight_decay)


def split_parameters(model: nn.Module) -> tuple[Parameters, Parameters]:
    """Return the trainable matrices (of linear layers and embeddings), and all other trainable parameters."""
    matrices = _weights(model, (nn.Linear, Conv1D, nn.Embedding))
    known = {id(parameter) for parameter in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    return matrices, others


def hidden_matrices(model: nn.Module) -> Parameters:
    """Return the trainable matrices of the linear layers inside of the blocks. Raises UserError."""
    stacks = [stack for _, stack in block_lists(model)]
    found = [weight for stack in stacks for weight in _weights(stack, (nn.Linear, Conv1D))]
    if not found:
        raise UserError(
            f"Muon needs the matrices of a model's blocks, and {type(model).__name__} has none to train that "
            "relufy recognises; set optimizer to adamw"
        )
    return found


def schedule_arguments(settings: Finetune) -> dict[str, Any]:
    """Return what TrainingArguments must be told for the learning rate's schedule."""
    options: dict[str, Any] = {}
    if settings.schedule == "wsd":
        after_warmup = max(settings.steps - settings.warmup_steps, 0)
        steps = min(math.ceil(settings.decay * settings.steps), after_warmup)
        options = {"num_decay_steps": steps, "decay_type": "linear"}
    return {
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": SCHEDULES[settings.schedule],
        "lr_scheduler_kwargs": options,
        "warmup_steps": settings.warmup_steps,
    }


def _weights(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Parameters:
    """Return the trainable weights of the modules of these kinds, each once, in the order of the modules."""
    found = [module.weight for module in model.modules() if isinstance(module, kinds)]
    unique = {id(weight): weight for weight in found if isinstance(weight, nn.Parameter)}
    return [weight for weight in unique.values() if weight.requires_grad]


def _groups(matrices: Parameters, others: Parameters, weight_decay: float) -> list[dict[str, Any]]:
    """Return the groups that have parameters, or (as LoRA's, all of which Muon takes) one without."""
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]] or groups[:1]
