"""What the Trainer is told: one pass in the given order, over any number of processes, without any output."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import TrainingArguments

from relufy.errors import UserError
from relufy.model.structure import find_blocks
from relufy.processes import num_processes
from relufy.recipe import Finetune
from relufy.train.optimizers import ADAM_BETAS, schedule_arguments

MAX_GRADIENT_NORM = 1.0
COMPILER = "inductor"
"""What torch.compile makes code with."""


def training_arguments(
    settings: Finetune, folder: Path, saves: bool, sharded_layers: Sequence[str] = ()
) -> TrainingArguments:
    """Return the Trainer's arguments. Raises UserError if the batch can't be divided among the processes.

    Under torchrun or accelerate each process takes its equal part of every batch. Where `sharded_layers`
    names the classes of blocks, weights, gradients and optimizer are split too (FSDP2); else each process has
    them whole (DDP).
    """
    parts = settings.accumulate * num_processes()
    if settings.batch_size % parts:
        raise UserError(
            f"batch_size {settings.batch_size} cannot be split into {settings.accumulate} parts (accumulate) "
            f"for each of {num_processes()} processes; choose a multiple of {parts}"
        )
    is_joined_on_cpu = num_processes() > 1 and distributed.get_backend() == "gloo"
    is_on_cpu = is_joined_on_cpu or not torch.accelerator.is_available()
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size // parts,
        gradient_accumulation_steps=settings.accumulate,
        ignore_data_skip=True,
        optim="adamw_torch",
        weight_decay=settings.weight_decay,
        adam_beta1=ADAM_BETAS[0],
        adam_beta2=ADAM_BETAS[1],
        max_grad_norm=MAX_GRADIENT_NORM,
        **schedule_arguments(settings),
        bf16=settings.precision == "bf16",
        torch_compile=settings.compile,
        torch_compile_backend=COMPILER if settings.compile else None,
        use_cpu=is_on_cpu,
        ddp_find_unused_parameters=False,
        **_sharded(settings, sharded_layers) if sharded_layers else {},
        seed=settings.seed,
        save_strategy="steps" if saves else "no",
        save_steps=settings.save_steps,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    if args.n_gpu > 1:
        args._n_gpu = 1  # else the Trainer would multiply the batch by the number of GPUs
    assert args.world_size == num_processes(), "else each process would train a model of its own"
    return args


def _sharded(settings: Finetune, layers: Sequence[str]) -> dict[str, Any]:
    """Return what asks for FSDP2, one unit for each block; gradients stay split between a step's parts."""
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": list(layers),
            "reshard_after_forward": True,
            "state_dict_type": "SHARDED_STATE_DICT",
            "activation_checkpointing": settings.gradient_checkpointing,
        },
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
    }


def layer_classes(model: nn.Module) -> list[str]:
    """Return the names of the classes of the model's blocks."""
    return sorted({type(model.get_submodule(block.name)).__name__ for block in find_blocks(model)})


def shard_teacher(teacher: nn.Module) -> None:
    """Split a model that is only read over the processes, block by block, as FSDP2 splits the trained one."""
    if isinstance(teacher, FSDPModule):
        return  # by an earlier stage
    for block in find_blocks(teacher):
        fully_shard(teacher.get_submodule(block.name))
    fully_shard(teacher)
