"""Leaving out attention heads by token, in any decoder: at the input of o, where each head has its channels.

A head's importance at a token is the norm of what it adds to the residual stream, `||x_h W_o[:, h]||` (Deja
Vu, arXiv 2310.17157, takes the same for its labels).
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from math import ceil
from typing import Any

import torch

from relufy.errors import UserError
from relufy.model.selections import greatest
from relufy.model.structure import BlockSites
from relufy.model.trial import Mask, Trial, trial_masks

Choices = dict[int, torch.Tensor]
"""Layer -> which heads a token keeps, bool `[..., heads]`."""
Score = Callable[[int, torch.Tensor], torch.Tensor]
"""From a layer and the input of o, `[..., channels]`, to a score of each head, `[..., heads]`."""
SKIPPED = 0.5
"""The share of heads that is left out, at least one and never all."""


def num_heads(config: Any, block: BlockSites) -> int:
    """Return the heads whose outputs o reads. Raises UserError where they cannot be told apart."""
    text = config.get_text_config()
    found = getattr(text, "num_attention_heads", None) or getattr(text, "n_head", None)
    width = block.o.shape[1]
    if not isinstance(found, int) or found < 1 or width % found:
        raise UserError(f"the {width} inputs of {block.o.name} are not those of {found} heads")
    if found == 1:
        raise UserError("its attention has one head, which cannot be left out")
    return found


def num_kept(heads: int) -> int:
    """Return how many heads a token keeps."""
    return min(heads - 1, max(1, ceil((1 - SKIPPED) * heads)))


class Heads:
    """The heads of every layer of a model, and their importance."""

    def __init__(self, config: Any, blocks: list[BlockSites]) -> None:
        self.blocks = blocks
        self.count = [num_heads(config, block) for block in blocks]
        self._gram = [_gram(block, heads) for block, heads in zip(blocks, self.count, strict=True)]

    def importance(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """Return the norm of each head's output, `[..., heads]`, from the input of o, `[..., channels]`."""
        by_head = x.float().unflatten(-1, (self.count[layer], -1))
        squares = torch.einsum("...hd,hde,...he->...h", by_head, self._gram[layer], by_head)
        return squares.clamp_min(0).sqrt()

    def choosing(self, score: Score, seen: Choices | None = None) -> AbstractContextManager[Trial]:
        """Keep the heads of the greatest score at every token; `seen` gets the last pass's choices."""

        def mask(layer: int) -> Mask:
            return lambda x: self._keep(x, self._choose(layer, score(layer, x), seen))

        return _Masked(self.blocks, mask)

    def keeping(self, choices: Mapping[int, torch.Tensor]) -> AbstractContextManager[Trial]:
        """Keep the heads that were chosen before."""

        def mask(layer: int) -> Mask:
            return lambda x: self._keep(x, choices[layer])

        return _Masked(self.blocks, mask)

    def kept(self, layer: int, scores: torch.Tensor) -> torch.Tensor:
        """Return which heads have the greatest scores, bool `[..., heads]`."""
        return greatest(scores, num_kept(self.count[layer]))

    def _choose(self, layer: int, scores: torch.Tensor, seen: Choices | None) -> torch.Tensor:
        chosen = self.kept(layer, scores)
        if seen is not None:
            seen[layer] = chosen
        return chosen

    def _keep(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        width = x.shape[-1] // chosen.shape[-1]
        flags = chosen.repeat_interleave(width, dim=-1).reshape(x.shape)
        return torch.where(flags, x, torch.zeros_like(x))


class _Masked(AbstractContextManager):
    """A mask at the input of every layer's o while this lasts."""

    def __init__(self, blocks: list[BlockSites], mask: Callable[[int], Mask]) -> None:
        self._blocks, self._mask, self._trial = blocks, mask, trial_masks(blocks)

    def __enter__(self) -> Trial:
        trial = self._trial.__enter__()
        for block in self._blocks:
            trial.put(block.index, "o", self._mask(block.index))
        return trial

    def __exit__(self, *error: Any) -> None:
        self._trial.__exit__(*error)


def _gram(block: BlockSites, heads: int) -> torch.Tensor:
    """Return W_o[:, h]^T W_o[:, h] of each head h, `[heads, width, width]`."""
    by_head = block.o.matrix().float().unflatten(1, (heads, -1))
    return torch.einsum("ohd,ohe->hde", by_head, by_head)
