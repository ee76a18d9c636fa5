"""Checkpoints: a stock Hugging Face folder, with the block `activation_sparsity` in its config.json."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from relufy.activation_sparsity import BLOCK_KEY, FATRELU, activation_name, read_activation_sparsity
from relufy.errors import UserError
from relufy.files import replacing
from relufy.hub import model_folder, read_config, tokenizer_folder, weight_files
from relufy.model.configuration import Pointer, has_block, refuse_quantized, sparsity_of
from relufy.model.fingerprints import check_model
from relufy.model.plugin import register
from relufy.model.provenance import versions
from relufy.model.sparsifiers import install_sparsity

register()


def load_model(
    folder: str | Path, dtype: torch.dtype = torch.float32, device_map: Any = None
) -> PreTrainedModel:
    """Return the model of a checkpoint, dense or relufied, in eval mode, its sparsifiers in place.

    `folder` may be "bundled" or a hub id. `device_map` is transformers': a device, or "auto" to spread the
    layers over all GPUs. Raises UserError if it is not a whole, unquantised checkpoint of a
    causal language model.
    """
    folder = model_folder(folder)
    config = read_config(folder)
    refuse_quantized(config, str(folder))
    weight_files(folder)  # refuses early a checkpoint that lacks one
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=_pointing_config(folder),
            dtype=dtype,
            device_map=device_map,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        model, report = loaded
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} could not be loaded: {_one_line(error)}") from error
    if absent := sorted(report["missing_keys"]):
        raise UserError(
            f"{folder}: the weights lack {len(absent)} tensors of the model, {absent[0]} among them"
        )
    if not has_block(model) and activation_name(model.config.to_dict()) == FATRELU:
        install_sparsity(model)  # sparse by nature, but not to transformers
    return model.eval()


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a checkpoint (as in `load_model`) or of any folder. Raises UserError."""
    folder = tokenizer_folder(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder} has no tokenizer that transformers can load: {_one_line(error)}"
        ) from error


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    provenance: dict[str, Any] | None = None,
    weights: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write the model, in the dtype that it has, and the tokenizer to a new folder, whole or not at all.

    `provenance` is added to the block's own, with the versions used. `weights` are the model's, by name,
    where it does not hold them itself (training spread it over processes); they are used up. Raises UserError
    if the folder is occupied, and for a model whose weights are no longer those that its sparsifiers' tensors
    were made of.
    """
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"a {type(model).__name__} is not a whole model; merge its adapters first")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(f"the {type(model).__name__} has adapters of its own; merge or delete them first")
    refuse_quantized(model.config.to_dict(), type(model).__name__)
    check_model(model)
    with replacing(Path(folder)) as temporary:
        model.save_pretrained(temporary, state_dict=weights and _as_in(model, weights))
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if has_block(model) or provenance:
            _complete_config(model, temporary / "config.json", provenance or {})
    return Path(folder)


def _as_in(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights in the types that the model has them in; `weights` is emptied on the way."""
    own = model.state_dict()
    return {name: weights.pop(name).to(own[name].dtype) for name in list(weights)}


def _complete_config(model: PreTrainedModel, file: Path, provenance: dict[str, Any]) -> None:
    config = json.loads(file.read_text())
    block = sparsity_of(model).to_block()
    block["provenance"] = block["provenance"] | provenance | {"versions": versions()}
    config[BLOCK_KEY] = block
    file.write_text(json.dumps(config, indent=2) + "\n")


def _pointing_config(folder: Path) -> PretrainedConfig:
    """Return the configuration, with the pointer to its block even where a tool has stripped it."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    has_pointer = getattr(config, "quantization_config", None) is not None
    has_own_block = getattr(config, BLOCK_KEY, None) is not None
    if has_own_block and not has_pointer and read_activation_sparsity(config.to_dict()).sparsifiers:
        config.quantization_config = Pointer().to_dict()
    return config


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
