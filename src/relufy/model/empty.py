"""The model that a config.json describes, without its weights: enough to see what sites it has."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from relufy.errors import UserError
from relufy.model.activations import Placeholder
from relufy.model.plugin import register
from relufy.model.structure import find_blocks


def build_empty(folder: Path) -> PreTrainedModel:
    """Return the model of a config.json on the meta device, in eval mode, its activations able to run.

    Raises UserError if transformers cannot build it.
    """
    register()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a configuration can break its model anywhere
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"transformers cannot build the model of {folder}: {reason}") from error
    for name, module in list(model.named_modules()):
        if isinstance(module, Placeholder):
            model.set_submodule(name, nn.ReLU())
    return model.eval()


def refuse_without_sites(folder: Path) -> None:
    """Raise UserError if a checkpoint's configuration alone tells that its model has no sites."""
    try:
        empty = build_empty(folder)
    except UserError:
        return  # loading the model says better what is wrong
    find_blocks(empty)
