"""Tiny models with planted troubles, as the doctor gets them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from tests.families import LLAMA_LIKE, build
from transformers import PreTrainedModel

from relufy.doctor.continuation import continue_greedily
from relufy.doctor.patient import Effort, Patient
from relufy.model.sites import find_sites

TINY = Effort(windows=8, window=24, prompts=2, new_tokens=6, levels=(0.3, 0.6, 0.9), batch_size=2)


def patient_of(
    model: PreTrainedModel, effort: Effort = TINY, dense: Any = None, wrote_it: bool = False
) -> Patient:
    """Return a patient with random text, or with one that the model wrote; token 0 opens each window."""
    shape = (effort.windows, effort.window)
    windows = np.random.default_rng(0).integers(3, model.config.vocab_size, shape)
    windows[:, 0] = 0
    if wrote_it:
        written = continue_greedily(model, windows[:, :4], effort.window - 4)
        windows = np.concatenate([windows[:, :4], written], axis=1)
    fit, test, config = windows[::2], windows[1::2], model.config.to_dict()
    return Patient("tiny", Path(), config, model, find_sites(model), fit, test, effort, dense)


def llama(**changes: Any) -> PreTrainedModel:
    return build(hf.LlamaConfig(**(LLAMA_LIKE | {"num_key_value_heads": 3} | changes)))


@torch.no_grad()
def with_dead_layer(layer: int = 1) -> PreTrainedModel:
    """Return a ReLU model, one of whose layers has a gate that is never open."""
    model = llama(hidden_act="relu", mlp_bias=True, num_hidden_layers=3)
    model.model.layers[layer].mlp.gate_proj.bias.fill_(-1e4)
    return model


@torch.no_grad()
def with_uneven_layers() -> PreTrainedModel:
    """Return a model that needs few of the neurons of its first layer, and all of its second."""
    model = llama()
    model.model.layers[0].mlp.down_proj.weight[:, 4:] *= 1e-3
    return model


@torch.no_grad()
def with_sink() -> PreTrainedModel:
    """Return a GPT-2 whose queries all look at position 0, which alone has a large value in channel 0."""
    from tests.families import family

    model = family("gpt2")
    width = model.config.n_embd
    model.transformer.wpe.weight[:, 0] = 0.0
    model.transformer.wte.weight[:, 0] = 0.0
    model.transformer.wpe.weight[0, 0] = 5000.0
    for block in model.transformer.h:
        block.attn.c_attn.weight[0, width : 2 * width] = 5.0
        block.attn.c_attn.bias[:width] = 5.0
    return model


@torch.no_grad()
def with_useless_head() -> PreTrainedModel:
    """Return a model of three heads, the last of which adds nothing."""
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[:, 16:] = 0.0
    return model
