"""Hiding keys and values by head: what attention reads when a skipped head writes none.

A mask `[batch, heads, queries, keys]` takes the place of the one that each attention module is given, so it
works wherever a module honours such a mask; `honours_masks` finds out by trying.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from relufy.errors import UserError
from relufy.model.structure import BlockSites

Visible = Callable[[int, int, int, torch.device], torch.Tensor]
"""From layer, batch and length to which keys each query of each head sees: bool `[batch, heads, q, k]`."""


@contextmanager
def hidden_keys(model: PreTrainedModel, blocks: list[BlockSites], visible: Visible) -> Iterator[None]:
    """Give every attention a mask of its own, on top of the one that it gets. Raises UserError."""
    with ExitStack() as hooks:
        for block in blocks:
            module = model.get_submodule(block.o.name.rpartition(".")[0])
            if "attention_mask" not in inspect.signature(module.forward).parameters:
                raise UserError(f"{type(module).__name__} takes no attention_mask")
            hook = _hook(module, block.index, visible)
            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _hook(module: nn.Module, layer: int, visible: Visible) -> Callable[..., Any]:
    signature = inspect.signature(module.forward)

    def replace(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments.get("attention_mask")
        hidden = next(iter(bound.arguments.values()))
        batch, length = hidden.shape[:2]
        seen = visible(layer, batch, length, hidden.device) & _causal(length, hidden.device)
        mask = torch.zeros(seen.shape, dtype=hidden.dtype, device=hidden.device)
        mask.masked_fill_(~seen, torch.finfo(hidden.dtype).min)
        bound.arguments["attention_mask"] = _joined(given, mask)
        return bound.args, bound.kwargs

    return replace


def _joined(given: Any, mask: torch.Tensor) -> torch.Tensor:
    """Return the mask with what the given one hides hidden too (a window, ALiBi)."""
    if not isinstance(given, torch.Tensor) or given.ndim != 4:
        return mask
    own = given[..., : mask.shape[-1]]
    if own.dtype == torch.bool:
        return mask.masked_fill(~own, torch.finfo(mask.dtype).min)
    return torch.maximum(mask + own, torch.full_like(mask, torch.finfo(mask.dtype).min))


def _causal(length: int, device: torch.device) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def written(choices: Mapping[int, torch.Tensor], groups: int) -> Visible:
    """Return what is seen if a head's keys are written at the tokens that kept it, or any of its group.

    `choices` are bool `[batch, time, heads]` by layer; heads that share keys and values (`groups` of them
    have their own) skip these only together.
    """

    def visible(layer: int, batch: int, length: int, device: torch.device) -> torch.Tensor:
        kept = choices[layer].reshape(batch, length, groups, -1)
        own = kept.any(-1, keepdim=True).expand_as(kept).reshape(batch, length, -1).to(device)
        diagonal = torch.eye(length, dtype=torch.bool, device=device)
        return own.transpose(1, 2)[:, :, None, :] | diagonal

    return visible


def honours_masks(model: PreTrainedModel, blocks: list[BlockSites], ids: torch.Tensor, heads: int) -> bool:
    """Tell whether a mask by head does what it says: hiding nothing changes nothing, hiding a key does."""

    def seeing(hidden: int | None) -> torch.Tensor:
        def visible(_layer: int, batch: int, length: int, device: torch.device) -> torch.Tensor:
            seen = torch.ones(batch, heads, length, length, dtype=torch.bool, device=device)
            if hidden is not None:
                seen[..., hidden + 1 :, hidden] = False
            return seen

        with hidden_keys(model, blocks, visible):
            return model(input_ids=ids, use_cache=False).logits.float()

    plain = model(input_ids=ids, use_cache=False).logits.float()
    scale = plain.abs().max()
    same = float((seeing(None) - plain).abs().max() / scale)
    other = float((seeing(1)[:, 2:] - plain[:, 2:]).abs().max() / scale)
    return same < 1e-3 and other > max(1e-5, 10 * same)
