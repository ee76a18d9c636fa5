"""Two processes with half a batch each find the penalty, gradients and zeros of one with all of it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import families
from relufy.methods.sparsify import sparsify
from relufy.model.structure import find_blocks
from relufy.recipe import Penalty
from relufy.train.monitor import Monitor
from relufy.train.penalty import NeuronPenalty

IDS = torch.randint(0, 53, (4, 17), generator=torch.Generator().manual_seed(0))
PENALTY = Penalty(target=0.9)
WRAPPINGS = ("ddp", "fsdp2", "fsdp2-checkpointed")


def relufied() -> nn.Module:
    return sparsify(families.family("llama"), "relufy-stage1").train()


def wrapped(model: nn.Module, wrapping: str) -> nn.Module:
    if wrapping == "ddp":
        return DistributedDataParallel(model)
    if wrapping == "fsdp2-checkpointed":
        model.gradient_checkpointing_enable()
    for block in find_blocks(model):
        fully_shard(model.get_submodule(block.name))
    return fully_shard(model)


def two_looks(model: nn.Module, wrapping: str | None, ids: torch.Tensor) -> dict[str, Any]:
    """Run two parts of a step on a model; return all that was found."""
    penalty, monitor = NeuronPenalty(model, PENALTY, 10), Monitor(model)
    outer = model if wrapping is None else wrapped(model, wrapping)
    terms = []
    with penalty.attached(), monitor.watching():
        for part in ids.split(len(ids) // 2):
            loss = outer(part).logits.square().mean()
            terms.append(penalty.term())
            ((loss + terms[-1]) / 2).backward()
    penalty.after_step(1)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
    return {
        "term": torch.stack(terms).mean().item(),
        "gradient": torch.cat([g.flatten() for g in whole]),
        "state": penalty.state(),
        "metrics": monitor.metrics(),
    }


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    model = relufied()
    ids = IDS[rank::2]
    found = {wrapping: two_looks(copy.deepcopy(model), wrapping, ids) for wrapping in WRAPPINGS}
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(work, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_two_processes_are_one(found: list[dict[str, Any]], wrapping: str) -> None:
    alone = two_looks(relufied(), None, IDS)
    first, second = (results[wrapping] for results in found)
    assert (first["term"] + second["term"]) / 2 == pytest.approx(alone["term"], rel=1e-5)
    assert first["term"] != second["term"]
    assert torch.equal(first["gradient"], second["gradient"])
    assert torch.allclose(first["gradient"], alone["gradient"], rtol=1e-3, atol=1e-6)
    assert first["state"] == second["state"] == pytest.approx(alone["state"], rel=1e-4)
    assert first["metrics"] == second["metrics"]
    for name in ("live_sparsity", "dead", "union_density", "dead_positions"):
        assert first["metrics"][name] == pytest.approx(alone["metrics"][name], abs=1e-6)
    assert first["metrics"]["sparsity"]["neuron"] == pytest.approx(alone["metrics"]["sparsity"]["neuron"])
