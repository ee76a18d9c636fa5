"""The selections: masks that keep some entries as they are, at projections' inputs or on activations' output.

A token that stays dense (`phase`, `dense_first_tokens`) passes unchanged. Which tokens those are is known to
the whole model alone, so one hook on its stack of blocks tells all its selections when a forward pass begins.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from relufy.activation_sparsity import Sparsifier
from relufy.errors import UserError
from relufy.model.activations import widened


class TokenPositions:
    """Where the tokens of the running forward pass stand: a forward pre-hook of the stack of blocks.

    A forward pass of more than one token is prompt, one of a single token is decoding. So a prompt that is
    fed token by token is decoded, and whoever generates without a cache computes a prompt each time. A
    position is what `position_ids` says; where it was not given, how many tokens before are not padding.
    """

    def __init__(self) -> None:
        self._positions: torch.Tensor | None = None

    def __call__(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = inspect.signature(stack.forward).bind_partial(*args, **kwargs).arguments
        self._positions = _positions(given | given.get("kwargs", {}))

    def is_prompt(self, x: torch.Tensor) -> bool:
        return self._of(x).shape[-1] > 1

    def before(self, position: int, x: torch.Tensor) -> torch.Tensor:
        """Return which tokens of x, [..., width], stand before a position: bool [..., 1]."""
        return (self._of(x).to(x.device) < position).reshape(*x.shape[:-1], 1)

    def _of(self, x: torch.Tensor) -> torch.Tensor:
        """Return the positions of x's tokens, [batch, time]."""
        known, rows = self._positions, x.numel() // x.shape[-1]
        batch, rest = divmod(rows, known.shape[-1]) if known is not None else (0, 0)
        if known is None or rest or known.shape[0] not in (1, batch):
            raise UserError(
                "a sparsifier with phase or dense_first_tokens needs the tokens' positions: run the whole "
                "model, not a part of it"
            )
        return known.expand(batch, -1)


def _positions(given: Mapping[str, Any]) -> torch.Tensor:
    """Return the position of each token of a forward pass: [batch or 1, time]."""
    if given.get("position_ids") is not None:
        return torch.atleast_2d(given["position_ids"])
    ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
    tokens = ids if ids is not None else embeddings[..., 0]  # type: ignore[index]
    time, mask = tokens.shape[-1], given.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        return (mask.long().cumsum(-1) - 1)[:, -time:]
    cache = given.get("past_key_values")
    past = cache.get_seq_length() if cache is not None else 0
    return (torch.arange(time, device=tokens.device) + past)[None]


class Selection(nn.Module):
    """`x` where it is kept, elsewhere its centre, or 0 where it has none; with a rotation, `s(x Q) Q^T`.

    At `neuron`, x is what `activation` makes of the pre-activation. `tensors` become persistent buffers.
    """

    threshold: torch.Tensor | None
    weight: torch.Tensor | None
    centre: torch.Tensor | None
    low_rank_in: torch.Tensor | None
    low_rank_out: torch.Tensor | None
    rotation: torch.Tensor | None

    def __init__(
        self,
        definition: Sparsifier,
        tensors: Mapping[str, torch.Tensor],
        positions: TokenPositions,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.definition = definition
        self.positions = positions
        self.activation = activation
        for name in ("threshold", "weight", "centre", "low_rank_in", "low_rank_out", "rotation"):
            self.register_buffer(name, tensors.get(name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.activation is not None:
            x = self.activation(x)
        if self._is_dense(x):
            return x
        if self.rotation is not None:
            return self._through_rotation(x)
        return torch.where(self._passes(x), x, self._background(x))

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        """Return what is kept of x in the basis of the rotation, elsewhere 0: in float32 or wider."""
        y = widened(x)
        y = y @ self.rotation.to(y.dtype)  # type: ignore[union-attr]
        return y if self._is_dense(x) else torch.where(self._passes(y), y, 0)

    def keeps(self, x: torch.Tensor) -> torch.Tensor:
        """Return which entries of x are kept in a token that is not dense. What is no number is kept."""
        if self.definition.function == "relu":
            return ~(x <= 0)
        score = self._score(x)
        if self.definition.function == "topk":
            return greatest(score, self.definition.k or 0)
        return ~(score < (self.definition.threshold or 0.0 if self.threshold is None else self.threshold))

    def correction(self, dropped: torch.Tensor) -> torch.Tensor:
        """Return what stands in for W times the dropped part of the input, x - s(x): `out (in dropped)`."""
        inner = nn.functional.linear(dropped, self.low_rank_in.to(dropped.dtype))  # type: ignore[union-attr]
        return nn.functional.linear(inner, self.low_rank_out.to(dropped.dtype))  # type: ignore[union-attr]

    def extra_repr(self) -> str:
        return f"{self.definition.function}, sites={' '.join(self.definition.sites)}"

    def _is_dense(self, x: torch.Tensor) -> bool:
        """Return whether every token of x stays dense."""
        return self.definition.phase == "decode" and self.positions.is_prompt(x)

    def _passes(self, x: torch.Tensor) -> torch.Tensor:
        """Return which entries of x pass as they are: those that are kept, and all of a dense token."""
        keeps, first = self.keeps(x), self.definition.dense_first_tokens
        return keeps | self.positions.before(first, x) if first else keeps

    def _through_rotation(self, x: torch.Tensor) -> torch.Tensor:
        y = self.rotated(x)
        back = (y @ self.rotation.to(y.dtype).T).to(x.dtype)  # type: ignore[union-attr]
        first = self.definition.dense_first_tokens
        return torch.where(self.positions.before(first, x), x, back) if first else back

    def _score(self, x: torch.Tensor) -> torch.Tensor:
        score = (widened(x) if self.centre is None else x - self.centre).abs()
        return score if self.weight is None else self.weight * score

    def _background(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x) if self.centre is None else self.centre.to(x.dtype).expand_as(x)


def greatest(score: torch.Tensor, k: int) -> torch.Tensor:
    """Return which entries along the last dimension are the k greatest; of equal ones the first: bool."""
    least = score.topk(k, dim=-1).values[..., -1:]
    above, equal = ~(score <= least), score == least
    missing = k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= missing))
