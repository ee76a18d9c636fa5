"""Tiny checkpoints as fixtures, made by transformers, sparsified by relufy, and packed."""

from collections.abc import Callable
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
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import relufy
from relufy.recipe import Relufication

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

RECIPES = {
    "dense": None,
    "stage1": Relufication(stage=1),
    "shifted": Relufication(stage=1, shift=0.05),
    "stage2": Relufication(stage=2),
}

MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Return a function that makes (once) a tiny random checkpoint: `make(recipe="stage1", **config)`."""
    made: dict[str, Path] = {}

    def make(recipe: str = "dense", **config: Any) -> Path:
        key = repr((recipe, sorted(config.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("checkpoint") / recipe
            _save(_random_model(**{**ODD, **config}), tiny_tokenizer(), recipe, made[key])
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


def _random_model(**config: Any) -> PreTrainedModel:
    """Return a model whose weights are large enough for its logits to depend on every part."""
    torch.manual_seed(0)
    is_llama = config["hidden_size"] % config["num_attention_heads"] == 0
    family = LlamaConfig if is_llama else partial(MistralConfig, sliding_window=None)
    model = AutoModelForCausalLM.from_config(family(**config, bos_token_id=0, eos_token_id=1))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=1.5 / parameter.shape[1] ** 0.5)
    return model.eval()


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
