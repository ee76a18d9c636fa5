"""Running a function in processes of its own: alone, or joined as torchrun would join them (CPU, gloo)."""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

PATIENCE = 120
NEEDED = ["relufy.train.run", "peft", "torch.distributed.checkpoint", "torch.distributed.fsdp"]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(NEEDED)
"""Imported once for all processes, in a server in which nothing else has happened."""

Function = Callable[..., Any]


def run_together(function: Function, *arguments: Any, folder: Path, processes: int = 2) -> list[Any]:
    """Return what the function gave in each process; an error there fails the test.

    What a process printed is in `folder`, in RANK.out.
    """
    port, deadline = free_port(), time.monotonic() + PATIENCE
    started = [
        start(function, *arguments, folder=folder, rank=rank, processes=processes, port=port)
        for rank in range(processes)
    ]
    for process in started:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
    results = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]
    for result in results:
        if isinstance(result, str) and result.startswith("Traceback"):
            pytest.fail(result)
    return results


def start(
    function: Function, *arguments: Any, folder: Path, rank: int = 0, processes: int = 1, port: int = 0
) -> Any:
    """Start a process that leaves what the function gives, or its traceback, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    environment = {"CUDA_VISIBLE_DEVICES": ""} | {name: str(value) for name, value in place.items()}
    process = CONTEXT.Process(
        target=_run, args=(function, arguments, folder / str(rank), environment), daemon=True
    )
    process.start()
    return process


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _run(function: Function, arguments: tuple, result: Path, environment: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment if environment["WORLD_SIZE"] != "1" else {"CUDA_VISIBLE_DEVICES": ""})
    with result.with_suffix(".out").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        try:
            value = function(*arguments)
        except BaseException:
            value = traceback.format_exc()
        torch.save(value, result.with_suffix(".pt"))
    os._exit(0)
