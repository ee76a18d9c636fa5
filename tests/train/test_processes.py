"""Two processes do what one does: the same losses at every step, the same weights, written once."""

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from families import family
from relufy.cli.quiet import quiet_libraries
from relufy.errors import UserError
from relufy.method import Relufication
from relufy.methods.sparsify import sparsify
from relufy.model.checkpoint import load_model, save_checkpoint
from relufy.processes import (
    is_main,
    join_processes,
    leave_processes,
    made_once,
    num_processes,
    wait_for_all,
)
from relufy.recipe import Finetune, Lora, Penalty
from relufy.train.checkpoints import checkpoint_folder, last_checkpoint
from relufy.train.finetune import finetune
from relufy.train.stream import StoredWindows, WindowStream
from relufy.train.trainer import FinetuneTrainer
from together import run_together

STEERED = Penalty(strength=(0.0, 1.0, 1.0), until=(0.2, 0.7, 1.0), target=0.8)
SETTINGS = Finetune(
    steps=5,
    batch_size=8,
    window=12,
    learning_rate=3e-3,
    warmup_steps=1,
    distill=0.5,
    match_hidden=3.0,
    penalty=Penalty(strength=(0.5,)),
    input_penalty=Penalty(strength=(0.1,)),
    save_steps=3,
)
CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "ddp": ("llama", False, {}),
    "ddp in parts": ("llama", False, {"accumulate": 2, "penalty": STEERED, "log_steps": 2}),
    "ddp recomputing": ("phi3", False, {"gradient_checkpointing": True}),
    "ddp lora": ("llama", False, {"lora": Lora(rank=2), "gradient_checkpointing": True}),
    "fsdp": ("llama", True, {"penalty": STEERED}),
    "fsdp in parts": ("llama", True, {"accumulate": 2}),
    "fsdp recomputing": ("llama", True, {"gradient_checkpointing": True}),
    "fsdp tied": ("gemma", True, {}),
}
STREAMED = ("ddp in parts", "fsdp in parts", "fsdp tied")
RESUMED = ("ddp in parts", "ddp lora", "fsdp", "fsdp recomputing")
BF16 = ("ddp", "fsdp")


def text(is_stream: bool) -> Any:
    ids = np.random.default_rng(0).integers(1, 53, (20, 12))
    if not is_stream:
        return ids
    sources = (StoredWindows(ids[:12], None), StoredWindows(ids[12:, 1:], 0))
    return WindowStream(sources, (0.7, 0.3), 12, seed=3)


def train(case: str, output: Path | None = None, teacher: Any = None, **more: Any) -> dict[str, Any]:
    """Train as the case says, alone or with the other processes, which save to `output` if it is given."""
    name, shard, changes = CASES[case]
    settings = replace(SETTINGS, **changes, precision=more.get("precision", "f32"))
    teacher, heard = teacher or family(name), []
    model = sparsify(copy.deepcopy(family(name)), Relufication(stage=2))
    done = finetune(
        model,
        settings,
        text(case in STREAMED),
        teacher=teacher,
        output=output,
        resume=more.get("resume", False),
        shard=shard and num_processes() > 1,
        on_log=heard.append,
    )
    found = done.weights if done.weights is not None else model.state_dict()
    weights = {key: value.clone() for key, value in found.items()}
    if output is not None and is_main() and not output.exists():
        save_checkpoint(model, None, output, weights=done.weights)
    logs = [{key: value for key, value in log.items() if key != "tokens_per_second"} for log in done.logs]
    return {"logs": logs, "heard": len(heard), "weights": weights}


def resumed(case: str, output: Path) -> dict[str, Any]:
    """Go on from the checkpoint in the middle."""
    wait_for_all()
    if is_main():
        shutil.rmtree(checkpoint_folder(output) / f"checkpoint-{SETTINGS.steps}")
    wait_for_all()
    return train(case, output, resume=True)


def told(function: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        function()
    return str(caught.value)


def diverge_in_one(case: str) -> str:
    teacher = family(CASES[case][0])
    if not is_main():
        with torch.no_grad():
            teacher.lm_head.weight.fill_(float("nan"))
    return told(lambda: train(case, teacher=teacher))


def fill_the_disk_of_one(case: str, output: Path) -> tuple[str, list[str]]:
    save = FinetuneTrainer._save_rng_state

    def fail(trainer: Any, folder: str) -> None:
        if trainer.state.global_step == SETTINGS.steps and not is_main():
            raise OSError("No space left on device")
        save(trainer, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FinetuneTrainer, "_save_rng_state", fail)
        message = told(lambda: train(case, output))
    wait_for_all()
    return message, sorted(path.name for path in checkpoint_folder(output).rglob("checkpoint-*"))


def train_all(folder: Path) -> dict[str, Any]:
    quiet_libraries()
    join_processes()
    found: dict[str, Any] = {case: train(case, folder / case) for case in CASES}
    found["resumed"] = {case: resumed(case, folder / case) for case in RESUMED}
    found["bf16"] = {case: train(case, precision="bf16") for case in BF16}
    found["diverged"] = {case: diverge_in_one(case) for case in ("ddp", "fsdp")}
    found["full"] = {case: fill_the_disk_of_one(case, folder / f"full {case}") for case in ("ddp", "fsdp")}
    uneven = replace(SETTINGS, batch_size=7, distill=0, match_hidden=0)
    found["uneven"] = told(lambda: finetune(family("llama"), uneven, text(False)))
    found["made"] = made_once(torch.distributed.get_rank)
    leave_processes()
    return found


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("together")
    return folder, run_together(train_all, folder, folder=folder)


@cache
def alone(case: str) -> dict[str, Any]:
    return train(case)


def flat(log: dict[str, Any]) -> dict[str, float]:
    """Return a report's numbers, each by a name of its own."""
    found: dict[str, float] = {}
    for name, value in log.items():
        for key, part in value.items() if isinstance(value, dict) else [("", value)]:
            parts = part if isinstance(part, list) else [part]
            found |= {f"{name} {key} {layer}": number for layer, number in enumerate(parts)}
    return found


def remembered(log: dict[str, Any]) -> dict[str, float]:
    """Return a report without what follows from the neurons seen before a checkpoint, which holds none."""
    forgotten = ("dead", "dead_positions", "live_sparsity")
    return flat({name: value for name, value in log.items() if name not in forgotten})


@pytest.mark.parametrize("case", CASES)
def test_reports_are_those_of_one_process(together, case: str) -> None:
    _, (main, other) = together
    assert len(main[case]["logs"]) == len(alone(case)["logs"]) >= 3
    for expected, found in zip(alone(case)["logs"], main[case]["logs"], strict=True):
        assert flat(found) == pytest.approx(flat(expected), rel=2e-4, abs=1e-6)
    assert other[case]["logs"] == main[case]["logs"]


@pytest.mark.parametrize("case", CASES)
def test_the_saved_model_is_that_of_one_process(together, case: str) -> None:
    folder, (main, _) = together
    expected, begun = alone(case)["weights"], family(CASES[case][0]).state_dict()
    saved = load_model(folder / case).state_dict()
    assert set(saved) == set(expected)
    moved = torch.cat([(expected[name] - begun[name]).flatten() for name in begun])
    for weights in (main[case]["weights"], saved):
        apart = torch.cat([(expected[name] - weights[name]).flatten() for name in expected])
        assert apart.norm() < 1e-2 * moved.norm()


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_is_an_unbroken_run(together, case: str) -> None:
    _, (main, _) = together
    found, expected = main["resumed"][case], main[case]
    assert 0 < found["heard"] < expected["heard"]
    for log, unbroken in zip(found["logs"], expected["logs"], strict=True):
        assert remembered(log) == pytest.approx(remembered(unbroken), rel=1e-5, abs=1e-7)
    for name, weight in expected["weights"].items():
        assert torch.allclose(found["weights"][name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", BF16)
def test_bf16_is_close(together, case: str) -> None:
    _, (main, _) = together
    found, expected = main["bf16"][case], main[case]
    assert {weight.dtype for weight in found["weights"].values()} == {torch.float32}
    for log, exact in zip(found["logs"], expected["logs"], strict=True):
        assert log["loss"] == pytest.approx(exact["loss"], rel=3e-2)
        assert log["loss"] != exact["loss"]


def test_all_stop_where_one_must(together) -> None:
    for process in together[1]:
        for message in process["diverged"].values():
            assert "diverged at step 1" in message
        for message, left in process["full"].values():
            assert "step 5 could not be written (No space left on device)" in message
            assert message.endswith("checkpoint-3")
            assert left == ["checkpoint-3"]
        assert "choose a multiple of 2" in process["uneven"]


def test_the_main_process_alone_reports_and_writes(together) -> None:
    folder, (main, other) = together
    assert [main["made"], other["made"]] == [0, 0]
    for case in CASES:
        assert (main[case]["heard"], other[case]["heard"]) == (len(main[case]["logs"]), 0)
        assert last_checkpoint(checkpoint_folder(folder / case)) is not None
    assert (folder / "1.out").read_text() == (folder / "0.out").read_text() == ""


def test_one_process_has_nothing_to_shard_over() -> None:
    with pytest.raises(UserError, match="one process, so nothing to shard over"):
        finetune(family("llama"), replace(SETTINGS, distill=0, match_hidden=0), text(False), shard=True)
