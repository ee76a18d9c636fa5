"""Predictors: low-rank scores of the MLP's input that name the neurons which may be active.

A layer's predictor hangs below the MLP's first projection (gate, or up in a plain MLP), so its tensors travel
with the checkpoint: `inner` [rank, hidden], `outer` [neurons, rank] and `threshold` [neurons]. It changes
nothing by itself; inside `predicting(model)` (predicting.py) the neurons that it leaves out are zero, as in
the engine's mode "predicted".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from relufy.activation_sparsity import PREDICTABLE, ActivationSparsity
from relufy.errors import UserError
from relufy.model.sparse_modules import SparseInput
from relufy.model.structure import BlockSites, Projection

ATTRIBUTE = "predictor"
TENSORS = ("inner", "outer", "threshold")

_BEYOND = 64.0
"""Pre-activations whose neurons are inactive below minus it, and active above it."""
_HALVINGS = 40


class NeuronPredictor(nn.Module):
    """Candidates are the neurons where `outer (inner x) >= threshold`. Computed in float32."""

    inner: torch.Tensor
    outer: torch.Tensor
    threshold: torch.Tensor

    def __init__(self, inner: torch.Tensor, outer: torch.Tensor, threshold: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in zip(TENSORS, (inner, outer, threshold), strict=True):
            self.register_buffer(name, tensor.detach().contiguous())

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scores of x `[..., hidden]`, float32 `[..., neurons]`."""
        return nn.functional.linear(nn.functional.linear(x.float(), self.inner.float()), self.outer.float())

    def candidates(self, x: torch.Tensor) -> torch.Tensor:
        """Return which neurons may be active, bool `[..., neurons]`. A score that is no number is kept."""
        return ~(self.scores(x) < self.threshold)

    def extra_repr(self) -> str:
        return f"rank={self.inner.shape[0]}"


@dataclass(frozen=True)
class PredictedLayer:
    """Where a layer's predictor hangs, and what it predicts."""

    block: BlockSites

    @property
    def index(self) -> int:
        return self.block.index

    @property
    def projection(self) -> Projection:
        """The MLP's first projection, whose input the predictor reads."""
        return self.block.gate or self.block.up

    @property
    def neurons(self) -> int:
        return self.block.down.shape[1]

    @property
    def hidden(self) -> int:
        return self.projection.shape[1]

    def name(self, tensor: str) -> str:
        """Return what a tensor of the predictor is called in a checkpoint."""
        return f"{self.projection.name}.{ATTRIBUTE}.{tensor}"

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        return {"inner": (rank, self.hidden), "outer": (self.neurons, rank), "threshold": (self.neurons,)}

    def predictor(self) -> NeuronPredictor | None:
        return getattr(self.projection.module, ATTRIBUTE, None)

    def put(self, predictor: NeuronPredictor) -> None:
        self.projection.module.add_module(ATTRIBUTE, predictor)

    def input_of(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the projection, called with x, computes with: x behind its own mask."""
        is_masked = isinstance(self.projection.module, SparseInput)
        return self.projection.module.sparsifier(x) if is_masked else x  # type: ignore[operator]


def predictable_layers(blocks: Sequence[BlockSites], sparsity: ActivationSparsity) -> list[PredictedLayer]:
    """Return the layers whose neurons have zeros that can be predicted.

    Raises UserError if there is none, and for zeros that no predictor can serve.
    """
    found = []
    for block in blocks:
        neuron = sparsity.at("neuron", block.index)
        if neuron is None:
            continue
        if neuron.function not in PREDICTABLE:
            raise UserError(
                f"a predictor can't choose among the neurons of a {neuron.function}: it needs all of them"
            )
        if neuron.phase != "all" or neuron.dense_first_tokens:
            raise UserError(
                "the neuron mask leaves some tokens dense, whose neurons a predictor would leave out; make "
                "it with phase: all and dense_first_tokens: 0"
            )
        found.append(PredictedLayer(block))
    if not found:
        raise UserError("no layer has zeros at its neurons, so there is nothing to predict; relufy it first")
    return found


def predictor_names(blocks: Sequence[BlockSites], sparsity: ActivationSparsity) -> set[str]:
    """Return the names that a checkpoint has for the predictor's tensors."""
    return {layer.name(tensor) for layer in _layers(blocks, sparsity) for tensor in TENSORS}


def put_predictor(
    blocks: Sequence[BlockSites], sparsity: ActivationSparsity, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Hang the predictor that the block describes below the projections, in place, instead of any other.

    `tensors` are by their names in a checkpoint. Raises UserError if one is missing or has another shape.
    """
    layers = _layers(blocks, sparsity)
    made = {layer.index: _made(layer, sparsity, tensors) for layer in layers}
    remove_predictor(blocks)
    for layer in layers:
        layer.put(made[layer.index])


def remove_predictor(blocks: Sequence[BlockSites]) -> bool:
    """Take predictors off, in place; return whether there was one."""
    with_one = [layer for layer in map(PredictedLayer, blocks) if layer.predictor() is not None]
    for layer in with_one:
        delattr(layer.projection.module, ATTRIBUTE)
    return bool(with_one)


def present_predictor(blocks: Sequence[BlockSites]) -> dict[str, torch.Tensor]:
    """Return the tensors of the predictor that the model has, by their names in a checkpoint."""
    return {
        layer.name(name): getattr(predictor, name)
        for layer in map(PredictedLayer, blocks)
        if (predictor := layer.predictor()) is not None
        for name in TENSORS
    }


def _layers(blocks: Sequence[BlockSites], sparsity: ActivationSparsity) -> list[PredictedLayer]:
    return predictable_layers(blocks, sparsity) if sparsity.predictor is not None else []


def _made(
    layer: PredictedLayer, sparsity: ActivationSparsity, tensors: Mapping[str, torch.Tensor]
) -> NeuronPredictor:
    """Return a layer's predictor where its weights are; thresholds in float32, so that no cut is rounded."""
    assert sparsity.predictor is not None
    weight: torch.Tensor = layer.projection.module.weight  # type: ignore[assignment]
    device, found = "cpu" if weight.is_meta else weight.device, []
    for name, shape in layer.shapes(sparsity.predictor.rank).items():
        tensor = tensors.get(layer.name(name))
        if tensor is None:
            raise UserError(f"the predictor needs the tensor {layer.name(name)}, which is missing")
        if tuple(tensor.shape) != shape or not tensor.is_floating_point() or tensor.isnan().any():
            raise UserError(
                f"{layer.name(name)} should be numbers {list(shape)}, is {tensor.dtype} {list(tensor.shape)}"
            )
        found.append(tensor.to(device, torch.float32 if name == "threshold" else weight.dtype))
    return NeuronPredictor(*found)


def cuts(layer: PredictedLayer) -> torch.Tensor:
    """Return from which pre-activation on each neuron is active, float32 `[neurons]`.

    Found by bisection with the layer's own activation, mask included: where there are several cuts (a small
    threshold on a SiLU), the one above 0.
    """
    activation = layer.block.activation.module
    weight: torch.Tensor = layer.projection.module.weight  # type: ignore[assignment]
    low = torch.full((1, layer.neurons), -_BEYOND, device=weight.device)
    high = -low
    with torch.no_grad():
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            is_active = activation(middle) != 0
            low, high = torch.where(is_active, low, middle), torch.where(is_active, middle, high)
    return high[0]
