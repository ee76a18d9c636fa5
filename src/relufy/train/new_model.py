"""A model with new weights, to be trained from scratch: a shape, and the activation of its MLPs."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN

from relufy.activation_sparsity import (
    BLOCK_KEY,
    FATRELU,
    RELUFY_ACT,
    ActivationSparsity,
    Sparsifier,
    activation_name,
)
from relufy.errors import UserError
from relufy.hub import config_folder, is_bundled
from relufy.model.beta_silu import BETAS, PREFIX
from relufy.model.configuration import find_activation_key, refuse_quantized
from relufy.model.plugin import register
from relufy.model.sparsifiers import apply_sparsity
from relufy.model.structure import find_blocks
from relufy.schema import suggest

register()

_LLAMA = {"bos_token_id": 0, "eos_token_id": 0, "rms_norm_eps": 1e-5}
_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "vocab_size", "tie_word_embeddings"),
)
SHAPES: dict[str, dict[str, Any]] = {
    name: _LLAMA | dict(zip(_SIZES, sizes, strict=True))
    for name, sizes in {
        "3m": (192, 512, 6, 3, 512, 4096, True),
        "30m": (512, 1408, 10, 8, 1024, 4096, True),
        "125m": (768, 2048, 12, 12, 2048, 32000, False),
        "350m": (1024, 2752, 24, 16, 2048, 32000, False),
        "1.3b": (2048, 5504, 24, 16, 2048, 32000, False),
    }.items()
}
"""Llama shapes by name; "3m" is the bundled model's. MLP widths are multiples of 64."""

OWN_SPARSIFIERS = ("helu", "drelu")
"""Activations with exact zeros that transformers has no name for; relu and relu2 go by theirs."""


def new_model(
    config: str | Path | PretrainedConfig,
    activation: str | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """Return a causal decoder with the family's own initialisation, seeded, in float32, in eval mode.

    `config` is a shape's name, a config.json, or a checkpoint (folder or hub id) whose weights are not looked
    at, nor the masks that were calibrated for them. `activation` is "helu", "drelu", "beta-silu:8" or a name
    that transformers knows; without one the configuration's own stays. A tokenizer gives its special tokens,
    and its size unless `vocab_size` is given. Leaves the global random state alone. Raises UserError.
    """
    refuse_unknown_activation(activation)
    wanted = read_shape(config)
    _set_vocabulary(wanted, vocab_size, tokenizer)
    _set_activation(wanted, activation)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(wanted, dtype=torch.float32).eval()
    if activation in OWN_SPARSIFIERS:
        apply_sparsity(model, ActivationSparsity((Sparsifier(("neuron",), activation),)))
    return model


def read_shape(config: str | Path | PretrainedConfig) -> PretrainedConfig:
    """Return a configuration that is fresh, unquantised and without our block. Raises UserError."""
    found = copy.deepcopy(config) if isinstance(config, PretrainedConfig) else _named_shape(config)
    refuse_quantized(found.to_dict(), str(config))
    for key in (BLOCK_KEY, "quantization_config"):
        if hasattr(found, key):
            delattr(found, key)
    found._name_or_path = ""  # else it would pass for a model that this one was made of
    return found


def _named_shape(config: str | Path) -> PretrainedConfig:
    name, path = str(config), Path(config)
    if name in SHAPES:
        return LlamaConfig(**SHAPES[name])
    if "/" not in name and not path.exists() and not is_bundled(name):
        known = suggest(name, list(SHAPES))
        raise UserError(f"there is no shape {name!r}{known}; or name a config.json, a folder, or a hub id")
    place = path if path.is_file() else config_folder(config)
    try:
        return AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its values can be wrong in many ways
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{place} is no configuration that transformers reads: {reason}") from None


def _set_vocabulary(
    config: PretrainedConfig, vocab_size: int | None, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    if tokenizer is not None:
        if vocab_size is not None and vocab_size < len(tokenizer):
            raise UserError(
                f"the tokenizer has {len(tokenizer)} pieces, more than the vocabulary {vocab_size}"
            )
        vocab_size = vocab_size or len(tokenizer)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
    if vocab_size is not None:
        config.vocab_size = vocab_size
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, int) and token >= config.vocab_size:
            raise UserError(
                f"{name} {token} is beyond the vocabulary of {config.vocab_size}; give a tokenizer"
            )


def _set_activation(config: PretrainedConfig, activation: str | None) -> None:
    """Write the activation's name where the family keeps it."""
    if activation is None:
        if activation_name(config.to_dict()) in (RELUFY_ACT, FATRELU):
            raise UserError("this configuration is a relufied model's; name the activation of the new one")
        return
    own = "relu" if activation in OWN_SPARSIFIERS else activation
    with torch.device("meta"):
        twin = _build(config)
    key = find_activation_key(twin, [block.activation.name for block in find_blocks(twin)])
    setattr(config, key, own)
    read_back = getattr(type(config).from_dict(config.to_dict()), key)
    if read_back != own:  # Gemma takes "gelu" for the approximation by tanh
        raise UserError(
            f"a saved {type(config).__name__} with {own!r} loads as {read_back!r}; name that instead"
        )


def refuse_unknown_activation(activation: str | None) -> None:
    """Raise UserError for a name that no new model can have. (None is the configuration's own.)"""
    if activation is None or activation in OWN_SPARSIFIERS:
        return
    if activation in ACT2FN and activation not in (RELUFY_ACT, FATRELU):
        return
    if activation.startswith(PREFIX):
        betas = ", ".join(f"{beta:g}" for beta in BETAS[:3])
        raise UserError(f"{activation!r} has no name of its own: beta is {betas}, and so on to {BETAS[-1]}")
    named = [name for name in ACT2FN if not name.startswith(PREFIX) and name not in (RELUFY_ACT, FATRELU)]
    known = suggest(activation, [*OWN_SPARSIFIERS, f"{PREFIX}8", *named])
    raise UserError(f"unknown activation {activation!r}{known}")


def _build(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    except Exception as error:  # a configuration can break its model anywhere
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"transformers cannot build this model: {reason}") from error
