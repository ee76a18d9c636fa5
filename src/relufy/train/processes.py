"""What a training process must know of the others: torchrun or accelerate started them, torch joins them."""

import torch
from torch import distributed


def num_processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def is_main() -> bool:
    """Return whether this process is the one that prints and saves."""
    return num_processes() == 1 or distributed.get_rank() == 0


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Return the elementwise sum of every process's tensor; all of them must call this."""
    if num_processes() > 1:
        values = values.clone()
        distributed.all_reduce(values)
    return values


def wait_for_all() -> None:
    """Return once every process has come here."""
    if num_processes() > 1:
        distributed.barrier()
