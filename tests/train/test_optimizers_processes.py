"""Muon on matrices that FSDP has split over two processes takes the steps that it takes on whole ones."""

import copy
from pathlib import Path

import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

import families
from relufy.model.structure import find_blocks
from relufy.recipe import Finetune
from relufy.train.optimizers import hidden_matrices, make_optimizer

MUON = Finetune(optimizer="muon", learning_rate=1e-2, weight_decay=0.1)
IDS = torch.randint(0, 53, (4, 17), generator=torch.Generator().manual_seed(0))


def sharded(model: nn.Module) -> nn.Module:
    for block in find_blocks(model):
        fully_shard(model.get_submodule(block.name))
    return fully_shard(model)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        model(input_ids=IDS).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in parameters]  # type: ignore[attr-defined]


def two_ways() -> list[list[torch.Tensor]]:
    """Return the hidden matrices after three steps: whole, and split with a saved state after two."""
    plain, split = families.family("llama"), sharded(families.family("llama"))
    steps(plain, make_optimizer(plain, MUON), 3)
    first, second = (make_optimizer(split, MUON) for _ in range(2))
    steps(split, first, 2)
    set_optimizer_state_dict(split, second, copy.deepcopy(get_optimizer_state_dict(split, first)))
    steps(split, second, 1)
    return [whole(hidden_matrices(model)) for model in (plain, split)]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.Tensor.bfloat16 = torch.Tensor.clone  # Muon's iteration without its rounding, to compare closely
    distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    found = two_ways()
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    distributed.destroy_process_group()


def test_split_matrices(tmp_path: Path) -> None:
    multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    before = whole(hidden_matrices(families.family("llama")))
    for old, plain, split in zip(before, *torch.load(tmp_path / "found.pt"), strict=True):
        assert (plain - old).abs().max() > 1e-2
        torch.testing.assert_close(split, plain, rtol=0, atol=1e-5)
