"""Tiny checkpoints as fixtures, made by transformers, sparsified by relufy, and packed."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import relufy
from relufy.activation_sparsity import ActivationSparsity, Sparsifier
from relufy.method import Relufication
from relufy.model.sites import find_sites
from relufy.model.sparsifiers import apply_sparsity, sparsity_tensors

from .engine.configurations import CONFIGS

ODD = {
    "hidden_size": 68,
    "intermediate_size": 172,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 22,
    "vocab_size": 513,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
}
"""Sizes that no vector width, block or partition divides. (Llama's own config refuses 3 heads on 68.)"""

ODD_OPT = {
    "hidden_size": 66,
    "word_embed_proj_dim": 66,
    "ffn_dim": 172,
    "num_attention_heads": 3,
    "vocab_size": 513,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "dropout": 0.0,
}

RANK = 5
"""Of random low-rank corrections."""

RECIPES = {
    "dense": None,
    "stage1": Relufication(stage=1),
    "shifted": Relufication(stage=1, shift=0.05),
    "stage2": Relufication(stage=2),
}

MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Return a function that makes (once) a tiny random checkpoint: `make(recipe="stage1", **config)`.

    `family` is "llama", "opt", or a name of CONFIGS (engine/configurations.py). `sparsifiers` puts any block
    on the model, with random tensors.
    """
    made: dict[str, Path] = {}

    def make(
        recipe: str = "dense", family: str = "llama", sparsifiers: Sequence[Sparsifier] = (), **config: Any
    ) -> Path:
        key = repr((recipe, family, tuple(sparsifiers), sorted(config.items())))
        if key not in made:
            model = _random_model(_config(family, config))
            if sparsifiers:
                sparsity = ActivationSparsity(tuple(sparsifiers))
                apply_sparsity(model, sparsity, random_tensors(model, sparsity))
            folder = tmp_path_factory.mktemp("checkpoint") / recipe
            _save(model, tiny_tokenizer(), recipe, folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def sparsified(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], Path]:
    """Return a function that saves a copy of a checkpoint with one of RECIPES applied, in float32."""

    def make(folder: Path, recipe: str) -> Path:
        target = tmp_path_factory.mktemp("sparsified") / f"{folder.name}-{recipe}"
        _save(relufy.load_model(folder), relufy.load_tokenizer(folder), recipe, target)
        return target

    return make


def _save(model: Any, tokenizer: Any, recipe: str, folder: Path) -> None:
    if RECIPES[recipe] is not None:
        relufy.sparsify(model, RECIPES[recipe])
    relufy.save_checkpoint(model, tokenizer, folder)


def _config(family: str, changes: dict[str, Any]) -> PretrainedConfig:
    if family in CONFIGS:
        return CONFIGS[family](**changes)
    special = {"bos_token_id": 0, "eos_token_id": 1}
    if family == "opt":
        return OPTConfig(**{**ODD_OPT, **changes}, **special, pad_token_id=2)
    sizes = {**ODD, **changes}
    is_llama = sizes["hidden_size"] % sizes["num_attention_heads"] == 0
    config = LlamaConfig if is_llama else partial(MistralConfig, sliding_window=None)
    return config(**sizes, **special)


def _random_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return a model whose weights are large enough for its logits to depend on every part."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                middle = 0 if name.endswith("bias") else 1
                parameter.copy_(middle + 0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=1.5 / parameter.shape[1] ** 0.5)
    return model.eval()


def random_tensors(model: PreTrainedModel, sparsity: ActivationSparsity) -> dict[str, torch.Tensor]:
    """Return tensors for the sparsifiers of a model that let about half of the entries pass."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in sparsity_tensors(find_sites(model), sparsity).items():
        sizes = [RANK if size is None else size for size in shape]
        kind = name.rpartition(".")[2]
        if kind in ("threshold", "weight"):
            tensors[name] = 0.2 + torch.rand(sizes, generator=generator)
        else:
            tensors[name] = 0.2 * torch.randn(sizes, generator=generator)
    return tensors


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per byte, which begins every text with token 0."""
    vocab = {"<s>": 0, "</s>": 1} | {
        c: i + 2 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers.decoders import ByteLevel

    tokenizer.decoder = ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
