"""What a process must know of the others: torchrun or accelerate started them, torch joins them."""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

Made = TypeVar("Made")

PATIENCE = timedelta(hours=6)
"""How long a process waits for the others: as long as the main one may write text that all will read."""


def join_processes() -> None:
    """Join the processes that torchrun or accelerate started, each with its own device.

    Through NCCL where there are GPUs, else through gloo. Does nothing in a process that is alone, or has
    joined. To be called before anything that asks which process this is.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def leave_processes() -> None:
    """Part from the other processes, when all of them are done."""
    if num_processes() > 1:
        distributed.destroy_process_group()


def num_processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def process_index() -> int:
    return distributed.get_rank() if num_processes() > 1 else 0


def own_device() -> str:
    """Return the GPU that this process has to itself ("cuda:1"), or "cpu" without any."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def is_main() -> bool:
    """Return whether this process is the one that prints and saves."""
    return process_index() == 0


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Return the elementwise sum of every process's tensor; all of them must call this."""
    if num_processes() > 1:
        values = values.clone()
        distributed.all_reduce(values)
    return values


def sums_over_processes(counts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return, on the CPU, the sums of every process's tensors, wherever they are; all must call this."""
    own = [tensor.cpu() for tensor in counts]
    return [torch.stack(parts).sum(0) for parts in zip(*from_all(own), strict=True)]


def from_all(value: Any) -> list[Any]:
    """Return every process's value, plain data, in the order of the processes; all of them must call this."""
    values = [value] * num_processes()
    if num_processes() > 1:
        distributed.all_gather_object(values, value)
    return values


def made_once(make: Callable[[], Made]) -> Made:
    """Return in every process what `make` gives in the main one; all of them must call this."""
    if num_processes() == 1:
        return make()
    made: list[Any] = [make() if is_main() else None]
    distributed.broadcast_object_list(made)
    return made[0]


def wait_for_all() -> None:
    """Return once every process has come here."""
    if num_processes() > 1:
        distributed.barrier()
