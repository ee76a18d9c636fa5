"""Putting sparsifiers on a model: those that are wanted, or those that its configuration describes."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.errors import UserError
from relufy.model.activations import Placeholder, ReLU, StatisticalTopK, make_activation, stock_activation
from relufy.model.compatibility import adds_zeros, check_sparsity
from relufy.model.configuration import (
    activation_key_to_write,
    refuse_quantized,
    sparsity_of,
    uses_own_activation,
    write_sparsity,
)
from relufy.model.places import Place, find_places
from relufy.model.predictor import predictor_names, present_predictor, put_predictor, remove_predictor
from relufy.model.selections import Selection, TokenPositions
from relufy.model.sites import find_sites
from relufy.model.sparse_modules import (
    AdapterGuard,
    make_dense,
    rectify_output,
    sparsify_input,
    sparsify_output,
)
from relufy.model.structure import BlockSites, find_blocks, stack_name
from relufy.model.tensors import checked_tensors, present_tensors, read_tensors


def apply_sparsity(
    model: PreTrainedModel,
    sparsity: ActivationSparsity,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> PreTrainedModel:
    """Put sparsifiers on the model and write its configuration, in place; return the model.

    `tensors` are those that the sparsifiers need, by their names in a checkpoint (`sparsity_tensors` lists
    them); what is not given is taken from the sparsifiers that the model has. Selections take the place of
    selections. A model that has all sparsifiers already is left as it is, with a warning. Raises UserError
    for what the model cannot have, and for what would take back or change the zeros of its activations.
    """
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"expected a transformers model, found {type(model).__name__}; merge its adapters first"
        )
    refuse_quantized(model.config.to_dict(), type(model).__name__)
    blocks = find_sites(model)
    check_sparsity(blocks, sparsity)
    is_new = adds_zeros(len(blocks), sparsity_of(model), sparsity)
    if not is_new and not tensors:
        warnings.warn("the model has these sparsifiers already; nothing was changed", stacklevel=2)
        return model
    places = find_places(blocks, sparsity)
    names = _names(places)
    kept = {name: tensor for name, tensor in present_tensors(model).items() if name in names}
    chosen = checked_tensors(places, kept | dict(tensors or {}), "tensors")
    _check_own_activations(places)
    key = activation_key_to_write(model, sparsity, [block.activation.name for block in blocks])
    _put(model, blocks, places, chosen)
    _put_predictor(blocks, sparsity, present_predictor(blocks))
    write_sparsity(model, sparsity, key)
    return model


def install_sparsity(model: PreTrainedModel, files: Sequence[str | Path] = ()) -> None:
    """Put the sparsifiers that the model's configuration describes on it, in place. Twice is harmless.

    Their tensors are those of the checkpoint's safetensors `files`, or those that the model has. Raises
    UserError if one is missing.
    """
    sparsity = sparsity_of(model)
    _replace_placeholders(model, sparsity)
    blocks = find_sites(model)
    check_sparsity(blocks, sparsity)
    places = find_places(blocks, sparsity)
    names = _names(places)
    kept = {name: tensor for name, tensor in present_tensors(model).items() if name in names}
    chosen = checked_tensors(places, kept | read_tensors(files, names), "the checkpoint")
    _check_own_activations(places)
    _put(model, blocks, places, chosen)
    of_predictor = read_tensors(files, predictor_names(blocks, sparsity))
    _put_predictor(blocks, sparsity, present_predictor(blocks) | of_predictor)


def sparsity_tensors(
    blocks: Sequence[BlockSites], sparsity: ActivationSparsity
) -> dict[str, tuple[int | None, ...]]:
    """Return the tensors that sparsifiers need: name in a checkpoint -> shape, where None is a rank."""
    places = find_places(blocks, sparsity)
    return {place.checkpoint_name(n): shape for place in places for n, shape in place.tensors().items()}


def _names(places: Sequence[Place]) -> set[str]:
    return {place.checkpoint_name(name) for place in places for name in place.tensors()}


def _replace_placeholders(model: PreTrainedModel, sparsity: ActivationSparsity) -> None:
    """Give the model activations that can run the token that finds the norms."""
    is_needed = uses_own_activation(sparsity, model.config.num_hidden_layers)
    for block in find_blocks(model):
        if isinstance(block.activation.module, Placeholder):
            own = stock_activation(sparsity.activation) if is_needed else ReLU()
            setattr(block.activation.owner, block.activation.attribute, own)


def _check_own_activations(places: Sequence[Place]) -> None:
    """Raise UserError where a sparsifier would build on an activation that it cannot build on."""
    for place in places:
        own, definition = _own_activation(place.block), place.sparsifier
        is_cut_off = definition.function == "statistical_topk"
        if place.kind != "activation" or not (is_cut_off or definition.is_selection):
            continue
        if own.state_dict():
            raise UserError(f"{place.name}: a {definition.function} cannot wrap an activation with weights")
        if is_cut_off and own(torch.zeros(1, device="cpu")).item():
            raise UserError(f"{place.name}: {type(own).__name__} of 0 is not 0, so no neuron would be zero")


def _own_activation(block: BlockSites) -> nn.Module:
    module = block.activation.module
    return module.activation if isinstance(module, Selection | StatisticalTopK) else module  # type: ignore[return-value]


def _put(
    model: nn.Module,
    blocks: Sequence[BlockSites],
    places: Sequence[Place],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Put the sparsifiers on their places, instead of all that were there."""
    tensors = {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    for block in blocks:
        _make_block_dense(block)
    positions = TokenPositions()
    for place in places:
        _put_one(place, {n: tensors[place.checkpoint_name(n)] for n in place.tensors()}, positions)
    _put_hooks(model.get_submodule(stack_name(blocks)), stack_name(blocks), places, positions)


def _put_predictor(
    blocks: Sequence[BlockSites], sparsity: ActivationSparsity, tensors: Mapping[str, torch.Tensor]
) -> None:
    if sparsity.predictor is not None:
        put_predictor(blocks, sparsity, tensors)
    elif remove_predictor(blocks):
        warnings.warn("the predictor was for other zeros and is gone; make one again", stacklevel=3)


def _make_block_dense(block: BlockSites) -> None:
    setattr(block.activation.owner, block.activation.attribute, _own_activation(block))
    for part in (*block.projections().values(), *filter(None, (block.attention_norm, block.mlp_norm))):
        make_dense(part.module)


def _put_one(place: Place, tensors: dict[str, torch.Tensor], positions: TokenPositions) -> None:
    activation, definition = place.block.activation, place.sparsifier
    tensors = placed(tensors, place)
    if place.kind == "norm":
        sparsify_output(place.module, _mask(definition, tensors, positions))
    elif place.kind == "projection":
        sparsify_input(place.module, Selection(definition, tensors, positions))
    else:
        own = activation.module
        if definition.is_selection:
            module: nn.Module = Selection(definition, tensors, positions, own)
        else:
            module = make_activation(definition, own)
        setattr(activation.owner, activation.attribute, module.train(own.training))
        if definition.function == "drelu":
            rectify_output(place.block.up.module)


def _mask(definition: Sparsifier, tensors: dict[str, torch.Tensor], positions: TokenPositions) -> nn.Module:
    """Return the mask of a shared input."""
    is_plain = definition.phase == "all" and not definition.dense_first_tokens
    if not definition.is_selection and is_plain:
        return make_activation(definition, nn.Identity())
    return Selection(definition, tensors, positions)


def placed(tensors: dict[str, torch.Tensor], place: Place) -> dict[str, torch.Tensor]:
    """Return the tensors where the block's weights are; vectors in float32, so that no cut is rounded."""
    weight: torch.Tensor = place.block.up.module.weight  # type: ignore[assignment]
    device = "cpu" if weight.is_meta else weight.device
    return {
        name: tensor.to(device, weight.dtype if name.startswith("low_rank") else torch.float32)
        for name, tensor in tensors.items()
    }


def _put_hooks(stack: nn.Module, name: str, places: Sequence[Place], positions: TokenPositions) -> None:
    for key, hook in list(stack._forward_pre_hooks.items()):
        if isinstance(hook, TokenPositions | AdapterGuard):
            del stack._forward_pre_hooks[key]
            stack._forward_pre_hooks_with_kwargs.pop(key, None)
    if any(p.sparsifier.phase != "all" or p.sparsifier.dense_first_tokens for p in places):
        stack.register_forward_pre_hook(positions, with_kwargs=True)
    own_masks = [p.name for p in places if p.kind == "projection"]
    own_masks += [p.block.up.name for p in places if p.sparsifier.function == "drelu"]
    if own_masks:
        guard = AdapterGuard([projection.removeprefix(f"{name}.") for projection in own_masks])
        stack.register_forward_pre_hook(guard, with_kwargs=True)
