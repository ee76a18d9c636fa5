"""What a relufied model's configuration says: the block, the activation's name, the pointer to the block."""

import copy
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from relufy.activation_sparsity import (
    ACTIVATION_KEYS,
    BLOCK_KEY,
    RELUFY_ACT,
    ActivationSparsity,
    Sparsifier,
    read_activation_sparsity,
)
from relufy.errors import UserError

POINTER_METHOD = "relufy"
POINTER_VERSION = 1

STOCK_NAMES = {"relu": "relu", "relu2": "relu2", "helu": "relu"}
"""The activations that transformers computes, by function; a HeLU is a ReLU but for its gradient."""


class Pointer(QuantizationConfigMixin):
    """The `quantization_config` of a relufied checkpoint: nothing is quantised, it points at the block.

    It lets transformers call relufy when it loads the checkpoint, and makes converters that ignore
    activations (llama.cpp) refuse it.
    """

    def __init__(self, version: int = POINTER_VERSION, quant_method: str = POINTER_METHOD) -> None:
        if version != POINTER_VERSION:
            raise UserError(
                f"config.json: version {version} of quantization_config is not known; upgrade relufy"
            )
        self.quant_method = quant_method  # type: ignore[assignment]
        self.version = version


def sparsity_of(model: nn.Module) -> ActivationSparsity:
    """Return the sparsity that the configuration describes: our block, or what its activation implies."""
    return read_activation_sparsity(model.config.to_dict())  # type: ignore[union-attr]


def sparse_sites(model: nn.Module) -> list[str]:
    """Return the sites with a sparsifier in some layer; a dReLU also makes zeros of its own before down."""
    sparsifiers = sparsity_of(model).sparsifiers
    found = {site for sparsifier in sparsifiers for site in sparsifier.sites}
    found |= {"down"} if any(sparsifier.function == "drelu" for sparsifier in sparsifiers) else set()
    return [site for site in ("q", "k", "v", "o", "gate", "up", "neuron", "down") if site in found]


def has_block(model: nn.Module) -> bool:
    """Return whether the configuration has a block of ours, rather than none or native sparsity."""
    return getattr(model.config, BLOCK_KEY, None) is not None


def write_sparsity(model: PreTrainedModel, sparsity: ActivationSparsity, activation_key: str | None) -> None:
    """Write block, activation name and pointer into the model's configuration, in place.

    Selections leave the activation's name alone: the weights are as good without them. A function's own name
    is written if it is all that changed, so that stock transformers computes the same; in every other case a
    name that stock transformers doesn't have. `activation_key` may be None where no name changes.
    """
    if activation_key is not None:
        own = _own_activation(model, activation_key)
        name = _name_to_write(sparsity, own)
        setattr(model.config, activation_key, name)
        if name == RELUFY_ACT and uses_own_activation(sparsity, model.config.num_hidden_layers):
            sparsity = replace(sparsity, activation=own)
    setattr(model.config, BLOCK_KEY, sparsity.to_block())
    model.config.quantization_config = Pointer()


def activation_key_to_write(
    model: PreTrainedModel, sparsity: ActivationSparsity, activations: Collection[str]
) -> str | None:
    """Return the configuration's key that has to say which activation the model has with this sparsity.

    None where it may stay as it is. Raises UserError if there is none (`find_activation_key`).
    """
    names = [getattr(model.config, key, None) for key in ACTIVATION_KEYS]
    if not _rewriting(sparsity) and RELUFY_ACT not in names:
        return None
    return find_activation_key(model, activations)


def uses_own_activation(sparsity: ActivationSparsity, num_layers: int) -> bool:
    """Return whether a layer computes the activation that the model had before, alone or as a part."""
    neurons = [sparsity.at("neuron", layer) for layer in range(num_layers)]
    return any(s is None or s.is_selection or s.function == "statistical_topk" for s in neurons)


def _rewriting(sparsity: ActivationSparsity) -> list[Sparsifier]:
    """Return the sparsifiers without which the weights compute something else."""
    return [s for s in sparsity.sparsifiers if not s.is_selection or "centre" in s.per_channel]


def _name_to_write(sparsity: ActivationSparsity, own: str | None) -> str | None:
    rewriting = _rewriting(sparsity)
    if not rewriting:
        return own
    first, *others = rewriting
    is_only_activation = not others and first.sites == ("neuron",) and not first.shift
    is_everywhere = first.layers is None or sum("neuron" in s.sites for s in sparsity.sparsifiers) == 1
    if is_only_activation and is_everywhere and first.function in STOCK_NAMES:
        return STOCK_NAMES[first.function]
    return RELUFY_ACT


def _own_activation(model: PreTrainedModel, activation_key: str) -> str | None:
    name = getattr(model.config, activation_key)
    return sparsity_of(model).activation if name == RELUFY_ACT else name


def find_activation_key(model: PreTrainedModel, activations: Collection[str]) -> str:
    """Return the configuration's key that decides the modules named `activations`, and no others.

    Tried out on a twin without weights. Raises UserError if there is none, since a checkpoint could then not
    say which activation it has.
    """
    keys = [key for key in ACTIVATION_KEYS if isinstance(model.config.to_dict().get(key), str)]
    for key in keys:
        if _decided_by(model, key) == set(activations):
            return key
    tried = f"tried {', '.join(keys)}" if keys else f"looked for {', '.join(ACTIVATION_KEYS)}"
    raise UserError(
        f"{type(model).__name__}: no key of its config.json decides the MLP's activation alone ({tried}), "
        "so a checkpoint of it could not be loaded as saved"
    )


def _decided_by(model: PreTrainedModel, key: str) -> set[str]:
    config: Any = copy.deepcopy(model.config)
    setattr(config, key, "sigmoid")  # no decoder has it by itself
    with torch.device("meta"):
        twin = type(model)(config)
    return {name for name, module in twin.named_modules() if isinstance(module, nn.Sigmoid)}


def refuse_quantized(config: dict[str, Any], where: str) -> None:
    """Raise UserError if the config.json is of a quantised checkpoint."""
    method = (config.get("quantization_config") or {}).get("quant_method", POINTER_METHOD)
    if method != POINTER_METHOD:
        raise UserError(
            f"{where} is quantised ({getattr(method, 'value', method)}); give the unquantised checkpoint"
        )
