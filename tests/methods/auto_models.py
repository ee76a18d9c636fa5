"""Tiny models with something to lose, and text that they wrote themselves."""

import numpy as np
import torch
from transformers import PreTrainedModel

import families
from relufy.methods.budget.texts import Texts, split

LENGTH = 24


def sharp(name: str = "llama") -> PreTrainedModel:
    """Return a random model whose predictions differ from token to token."""
    model = families.family(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3.0)
    return model.eval()


def with_idle_layer(model: PreTrainedModel, layer: int) -> PreTrainedModel:
    """Make a Llama's layer add nothing, whatever it computes."""
    block = model.model.layers[layer]
    with torch.no_grad():
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    return model


def own_windows(model: PreTrainedModel, count: int = 100, seed: int = 0) -> np.ndarray:
    """Return windows that the model draws from its own predictions, each opened by token 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(count, 1, dtype=torch.long)
    with torch.inference_mode():
        for _ in range(LENGTH - 1):
            logits = model(input_ids=ids, use_cache=False).logits[:, -1].float()
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
    return ids.numpy()


def own_texts(model: PreTrainedModel, count: int = 100) -> Texts:
    return split(own_windows(model, count), seed=0)
