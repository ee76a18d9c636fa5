"""LoRA: train low-rank adapters around the projections, and merge them into the weights at the end.

A mask that all readers of an input share sits on what makes the input, so the adapters see the same zeros as
the weights that they will be part of. Where a projection has a mask of its own, peft's wrapping is refused
(model/sparse_modules.py).
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from relufy.errors import UserError
from relufy.model.structure import find_blocks
from relufy.recipe import Lora


@contextmanager
def adapted(model: PreTrainedModel, lora: Lora | None) -> Iterator[Any]:
    """Give the model with adapters to train, or without `lora` the model itself.

    When the context ends the adapters are part of the model's weights, in place; after an error they are gone
    and the weights are as they were. Raises UserError for targets that the model does not have.
    """
    if lora is None:
        yield model
        return
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets) or _projections(model),
        task_type="CAUSAL_LM",
    )
    requires = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        with warnings.catch_warnings(action="ignore"):  # of names that transformers will drop, and of Conv1D
            wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"LoRA: {' '.join(str(error).split())[:200]}") from None
    is_done = False
    try:
        yield wrapped
        is_done = True
    finally:
        _ = wrapped.merge_and_unload() if is_done else wrapped.unload()  # type: ignore[operator]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(requires[name])
        if hasattr(model, "peft_config"):
            del model.peft_config


def _projections(model: PreTrainedModel) -> list[str]:
    """Return the full names of every projection of the blocks."""
    return sorted({p.name for block in find_blocks(model) for p in block.projections().values()})
