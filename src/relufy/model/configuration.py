"""What a relufied model's configuration says: the block, the activation's name, the pointer to the block."""

import copy
from collections.abc import Collection
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
    read_activation_sparsity,
)
from relufy.errors import UserError

POINTER_METHOD = "relufy"
POINTER_VERSION = 1


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


def has_block(model: nn.Module) -> bool:
    """Return whether the configuration has a block of ours, rather than none or native sparsity."""
    return getattr(model.config, BLOCK_KEY, None) is not None


def write_sparsity(model: PreTrainedModel, sparsity: ActivationSparsity, activation_key: str) -> None:
    """Write block, activation name and pointer into the model's configuration, in place.

    The activation's own name is written if it is all that changed, so that stock transformers computes the
    same; in every other case a name that stock transformers doesn't have.
    """
    first, *others = sparsity.sparsifiers
    is_stock = not others and first.sites == ("neuron",) and first.shift == 0
    setattr(model.config, activation_key, first.function if is_stock else RELUFY_ACT)
    setattr(model.config, BLOCK_KEY, sparsity.to_block())
    model.config.quantization_config = Pointer()


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
