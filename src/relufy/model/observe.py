"""Counting the zeros at every site while a model runs."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from relufy.model.counting import count_rows
from relufy.model.selections import Selection
from relufy.model.structure import BlockSites, find_blocks, stack_name

ZerosOfTokens = Callable[[str, int, torch.Tensor], None]
"""Called with a site, a layer, and the number of zeros at each token, `[batch * time]`."""
ValuesOfTokens = Callable[[str, int, torch.Tensor], None]
"""Called with a site, a layer, and what is there, `[..., width]`."""
ZeroMasks = Callable[[str, int, torch.Tensor], None]
"""Called with a site, a layer, and what is zero there, bool `[batch * time, width]`, padding too. Sites that
read one tensor are shown one and the same mask."""


class Observer:
    """Exact zero counts per site and layer, summed over every forward pass that ran while it was attached.

    Every position counts once, the beginning-of-sequence token too; positions that a two-dimensional
    attention mask marks as padding do not. What gradient checkpointing computes again is not counted again.
    """

    def __init__(
        self,
        num_layers: int,
        each: ZerosOfTokens | None = None,
        values: ValuesOfTokens | None = None,
        masks: ZeroMasks | None = None,
    ) -> None:
        self._num_layers = num_layers
        self._each, self._values, self._masks = each, values, masks
        self._zeros: dict[str, list[Any]] = {}
        self._widths: dict[str, int] = {}
        self._tokens: Any = 0
        self._is_running = False
        self._mask: torch.Tensor | None = None
        self._last: tuple[Any, Any, Any] = (None, None, None)
        """The last tensor that was seen, what is zero in it, and how often at each token."""
        self._stand_ins: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=2)
        """Of a shared input and, where attention and MLP are parallel, of o between its readers."""

    @property
    def tokens(self) -> int:
        """How many positions were counted."""
        return int(self._tokens)

    def zeros(self) -> dict[str, list[int]]:
        """Return the number of zeros at each site, per layer, out of `tokens` times the site's width."""
        return {site: [int(zeros) for zeros in layers] for site, layers in self._zeros.items()}

    def sparsity(self) -> dict[str, list[float]]:
        """Return the share of zeros at each site, per layer. Raises ValueError if nothing has run yet."""
        if not self.tokens:
            raise ValueError("nothing was observed: run the model inside the `with` block first")
        return {
            site: [zeros / (self.tokens * self._widths[site]) for zeros in layers]
            for site, layers in self.zeros().items()
        }

    def begin(self, mask: Any) -> None:
        """Start counting a forward pass."""
        self._is_running = True
        self._mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None

    def end(self) -> None:
        """Stop counting until the next forward pass begins."""
        self._is_running = False
        self._mask, self._last = None, (None, None, None)
        self._stand_ins.clear()

    def count_instead(self, values: torch.Tensor, read: torch.Tensor) -> None:
        """Remember that `read` has zeros where nothing is read of what a mask returned as `values`."""
        if self._is_running:
            self._stand_ins.append((values, read))

    def count(self, site: str, layer: int, values: torch.Tensor) -> None:
        """Count the zeros of `values`, [..., width], at a site."""
        if not self._is_running:
            return
        values = next((read for masked, read in self._stand_ins if masked is values), values)
        if site == "q" and layer == 0:
            self._tokens = self._tokens + self._kept(values).sum()
        if self._last[0] is not values:  # projections that share an input see the same tensor
            is_zero = values.flatten(0, -2) == 0
            self._last = (values, is_zero, count_rows(is_zero) * self._kept(values))
        self._widths[site] = values.shape[-1]
        layers = self._zeros.setdefault(site, [0] * self._num_layers)
        layers[layer] = layers[layer] + self._last[2].sum()
        if self._each is not None:
            self._each(site, layer, self._last[2])
        if self._masks is not None:
            self._masks(site, layer, self._last[1])
        if self._values is not None:
            self._values(site, layer, values)

    def _kept(self, values: torch.Tensor) -> torch.Tensor:
        """Return which rows are tokens, not padding: bool [rows]."""
        rows = values.numel() // values.shape[-1]
        if self._mask is None:
            return torch.ones(rows, dtype=torch.bool, device=values.device)
        batch = self._mask.shape[0]
        return self._mask[:, -(rows // batch) :].to(values.device).bool().reshape(-1)


@contextmanager
def observe_sites(
    model: nn.Module,
    each: ZerosOfTokens | None = None,
    values: ValuesOfTokens | None = None,
    masks: ZeroMasks | None = None,
) -> Iterator[Observer]:
    """Count zeros at every site of the model while this context lasts, and show `each` those of the tokens.

    `values` is shown what the zeros are counted in, `masks` where in it they are.

    `neuron` is the activation's output; the others are the inputs of the projections, behind their masks.
    Where a mask has a centre, what counts as zero is what equals it; where it has a rotation, zeros are
    counted in that basis. A fused projection counts at each site that it serves; a plain MLP has no `gate`.
    Raises UserError for a model that is not recognised.
    """
    blocks = find_blocks(model)
    observer = Observer(len(blocks), each, values, masks)
    with ExitStack() as hooks:
        stack = model.get_submodule(stack_name(blocks))
        begin = stack.register_forward_pre_hook(
            lambda _module, _args, kwargs: observer.begin(kwargs.get("attention_mask")), with_kwargs=True
        )
        hooks.callback(begin.remove)
        hooks.callback(stack.register_forward_hook(lambda *_: observer.end(), always_call=True).remove)
        for module in model.modules():
            if isinstance(module, Selection) and module.centre is not None:
                hooks.callback(module.register_forward_hook(_centre_hook(observer)).remove)
            if isinstance(module, Selection) and module.rotation is not None:
                hooks.callback(module.register_forward_hook(_rotation_hook(observer)).remove)
        for block in blocks:
            _attach(hooks, observer, block)
        yield observer


def _attach(hooks: ExitStack, observer: Observer, block: BlockSites) -> None:
    for site, projection in block.projections().items():
        mask = getattr(projection.module, "sparsifier", None)
        if isinstance(mask, Selection):
            handle = mask.register_forward_hook(_output_hook(observer, site, block.index))
        else:
            handle = projection.module.register_forward_pre_hook(_input_hook(observer, site, block.index))
        hooks.callback(handle.remove)
    output_hook = _output_hook(observer, "neuron", block.index)
    hooks.callback(block.activation.module.register_forward_hook(output_hook).remove)


def _input_hook(observer: Observer, site: str, layer: int) -> Callable[..., None]:
    return lambda _module, args: observer.count(site, layer, args[0])


def _centre_hook(observer: Observer) -> Callable[..., None]:
    return lambda module, _args, output: observer.count_instead(
        output, output - module.centre.to(output.dtype)
    )


def _rotation_hook(observer: Observer) -> Callable[..., None]:
    return lambda module, args, output: observer.count_instead(output, module.rotated(args[0]))


def _output_hook(observer: Observer, site: str, layer: int) -> Callable[..., None]:
    return lambda _module, _args, output: observer.count(site, layer, output)
