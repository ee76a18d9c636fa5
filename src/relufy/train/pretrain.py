"""Training from scratch: a new model, and the training that fine-tuning uses too."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from relufy.activation_sparsity import NATIVE_ACTIVATIONS, activation_name
from relufy.errors import UserError
from relufy.hub import context_length
from relufy.recipe import Finetune
from relufy.text import refuse_long_windows
from relufy.train.checkpoints import checkpoint_folder, last_checkpoint
from relufy.train.finetune import FinetuneResult, finetune
from relufy.train.new_model import OWN_SPARSIFIERS, new_model, read_shape, refuse_unknown_activation
from relufy.train.stream import WindowStream
from relufy.train.trainer import OnLog

PRETRAINING = Finetune(
    steps=400,
    batch_size=16,
    window=128,
    learning_rate=5e-3,
    warmup_steps=40,
    schedule="wsd",
    optimizer="muon",
    log_steps=10,
    save_steps=100,
)
"""What trains the shape "3m" on a novel within minutes on a CPU; larger models want a smaller rate."""

INCIDENTAL = ("architectures", "dtype", "transformers_version", "use_cache")
"""What two configurations of the same model may differ in."""


def pretrain(
    config: str | Path | PretrainedConfig,
    settings: Finetune,
    windows: np.ndarray | WindowStream,
    *,
    activation: str | None = None,
    vocab_size: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output: Path | None = None,
    resume: bool = False,
    on_log: OnLog | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, FinetuneResult]:
    """Make a new model (`new_model`), train it (`finetune`), and return it with what that took.

    The settings' seed is that of the weights too. `options` go to `finetune` as they are. Raises UserError.
    """
    check_pretraining(config, settings, activation)
    model = new_model(config, activation, vocab_size, settings.seed, tokenizer=tokenizer)
    if resume and output is not None:
        refuse_other_model(model, output)
    done = finetune(model, settings, windows, output=output, resume=resume, on_log=on_log, **options)
    return model, done


def refuse_other_model(model: PreTrainedModel, output: Path) -> None:
    """Raise UserError if the run towards `output` has checkpoints of a model with another configuration."""
    last = last_checkpoint(checkpoint_folder(output))
    if last is None or not (last / "config.json").is_file():
        return
    ours, theirs = json.loads(model.config.to_json_string()), json.loads((last / "config.json").read_text())
    for key in sorted({*ours, *theirs} - {*INCIDENTAL}):
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"{last} holds a model with {key} {theirs.get(key)!r}, not {ours.get(key)!r}; resume with it"
            )


def check_pretraining(
    config: str | Path | PretrainedConfig, settings: Finetune, activation: str | None
) -> None:
    """Raise UserError for what a new model cannot be or be trained with; to be asked before any long work."""
    refuse_unknown_activation(activation)
    shape = read_shape(config).to_dict()
    refuse_long_windows(settings.window, context_length(shape))
    chosen = activation or activation_name(shape)
    has_target = settings.penalty is not None and settings.penalty.target is not None
    if has_target and chosen not in (*OWN_SPARSIFIERS, *NATIVE_ACTIVATIONS):
        raise UserError(f"{chosen} makes no exact zeros, so no share of them can be reached; take relu")
    if settings.needs_teacher:
        raise UserError("a new model has no dense original: set distill and match_hidden to 0")
    if settings.lora is not None:
        raise UserError("LoRA adapts weights that have been trained; leave it out for a new model")
