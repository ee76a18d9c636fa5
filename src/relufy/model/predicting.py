"""The mode "predicted" on the Hugging Face side, for measuring: only candidates' neurons are computed."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from relufy.errors import UserError
from relufy.model.configuration import sparsity_of
from relufy.model.predictor import NeuronPredictor, PredictedLayer, predictable_layers
from relufy.model.selections import TokenPositions
from relufy.model.structure import find_blocks, stack_name


@contextmanager
def predicting(
    model: PreTrainedModel, predictors: Mapping[int, NeuronPredictor] | None = None
) -> Iterator[None]:
    """Run the model in the mode "predicted" while this context lasts: other neurons than candidates are 0.

    `predictors` by layer stand for the model's own. Raises UserError if there is none.
    """
    blocks, sparsity = find_blocks(model), sparsity_of(model)
    layers = {layer.index: layer for layer in predictable_layers(blocks, sparsity)}
    chosen = predictors
    if chosen is None:
        chosen = {index: p for index, layer in layers.items() if (p := layer.predictor()) is not None}
    if not chosen:
        raise UserError("the model has no predictor; make one with `relufy predictor`")
    dense_first = sparsity.predictor.dense_first_tokens if sparsity.predictor is not None else 1
    positions = TokenPositions()
    with ExitStack() as hooks:
        stack = model.get_submodule(stack_name(blocks))
        hooks.callback(stack.register_forward_pre_hook(positions, with_kwargs=True).remove)
        for index, predictor in chosen.items():
            state = _Running(layers[index], predictor, positions, dense_first)
            hooks.enter_context(state.attached())
        yield


@dataclass
class _Running:
    """A layer's predictor at work: what the first projection reads decides what the activation returns."""

    layer: PredictedLayer
    predictor: NeuronPredictor
    positions: TokenPositions
    dense_first: int
    candidates: torch.Tensor | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        with watching(self.layer, self._read, self._mask):
            yield

    def _read(self, x: torch.Tensor) -> None:
        found = self.predictor.candidates(x)
        self.candidates = found | self.positions.before(self.dense_first, x) if self.dense_first else found

    def _mask(self, neurons: torch.Tensor) -> torch.Tensor:
        assert self.candidates is not None
        return torch.where(self.candidates, neurons, 0)


@contextmanager
def watching(
    layer: PredictedLayer,
    read: Callable[[torch.Tensor], None],
    neurons: Callable[[torch.Tensor], torch.Tensor | None],
) -> Iterator[None]:
    """Show `read` what the first projection computes with, then `neurons` what the activation returns.

    Both are `[..., width]`; what `neurons` returns stands for what it was shown, unless it is None.
    """

    def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
        read(layer.input_of(args[0]))

    def after(_module: nn.Module, _args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        return neurons(output)

    handles = [
        layer.projection.module.register_forward_pre_hook(before),
        layer.block.activation.module.register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
