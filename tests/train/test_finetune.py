"""Fine-tuning: it recovers the dense model, it repeats exactly, and it can be interrupted."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from families import family
from relufy.errors import UserError
from relufy.measure.quality import fidelity, perplexity
from relufy.method import Relufication
from relufy.methods.sparsify import sparsify
from relufy.recipe import Finetune, Penalty
from relufy.train.checkpoints import checkpoint_folder, last_checkpoint, remove_checkpoints
from relufy.train.finetune import finetune, stored

SHORT = Finetune(
    steps=6, batch_size=4, window=8, learning_rate=3e-3, warmup_steps=2, distill=1.0, save_steps=2
)


@pytest.fixture
def teacher():
    return family("llama")


def relufied(teacher, stage: int = 1):
    return sparsify(copy.deepcopy(teacher), Relufication(stage=stage))


def windows_of(count: int = 16, length: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 53, (count, length))


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def with_changes(settings: Finetune, **changes) -> Finetune:
    return Finetune(**{**settings.__dict__, **changes})


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("match_hidden", [0.0, 3.0])
def test_distillation_brings_the_model_back_to_the_dense_one(
    teacher, stage: int, match_hidden: float
) -> None:
    model, before = relufied(teacher, stage), weights(teacher)
    opened = fidelity(teacher, model, windows_of()).kl
    settings = with_changes(SHORT, steps=40, learning_rate=1e-2, match_hidden=match_hidden)
    result = finetune(model, settings, windows_of(), teacher=teacher)
    assert fidelity(teacher, model, windows_of()).kl < 0.7 * opened
    assert torch.equal(weights(teacher), before), "the teacher is not trained"
    assert result.losses[-1] < result.losses[0]


def test_cross_entropy_needs_no_teacher_and_learns_the_text(teacher) -> None:
    model, windows = relufied(teacher), windows_of(4)
    before = perplexity(model, windows).perplexity
    finetune(model, with_changes(SHORT, steps=30, distill=0.0, learning_rate=1e-2), windows)
    assert perplexity(model, windows).perplexity < 0.5 * before


def test_the_logs_say_what_happened(teacher) -> None:
    seen: list[dict] = []
    model = relufied(teacher)
    opened = fidelity(teacher, model, stored(windows_of(), 0).take(4)).kl
    result = finetune(model, SHORT, windows_of(), teacher=teacher, on_log=seen.append)
    assert seen == list(result.logs) and [log["step"] for log in seen] == [1, 2, 3, 4, 5, 6]
    assert seen[0]["loss"] == seen[0]["kl"] == pytest.approx(opened, rel=1e-4)
    rates = [log["learning_rate"] / SHORT.learning_rate for log in seen]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.75, 0.5, 0.25])
    assert [log["tokens"] for log in seen] == [28 * step for step in range(1, 7)]
    assert all(log["tokens_per_second"] > 0 for log in seen)
    assert (result.steps, result.tokens, result.epochs) == (6, 6 * 28, 1.5)


def test_nothing_is_printed_and_nothing_is_left_behind(
    teacher, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = relufied(teacher)
    finetune(model, SHORT, windows_of(), teacher=teacher)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert not list(tmp_path.iterdir())
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


def test_the_same_seed_gives_the_same_model(teacher) -> None:
    one, two, other = relufied(teacher), relufied(teacher), relufied(teacher)
    first = finetune(one, SHORT, windows_of(), teacher=teacher)
    torch.rand(7)
    second = finetune(two, SHORT, windows_of(), teacher=teacher)
    third = finetune(other, with_changes(SHORT, seed=1), windows_of(), teacher=teacher)
    assert first.losses == second.losses and torch.equal(weights(one), weights(two))
    assert first.losses != third.losses


@pytest.mark.parametrize("distill", [0.0, 0.5, 1.0])
def test_accumulation_changes_memory_not_the_result(teacher, distill: float) -> None:
    penalty = Penalty(strength=(5.0,))
    settings = with_changes(SHORT, distill=distill, match_hidden=2.0, penalty=penalty, input_penalty=penalty)
    whole, parts = relufied(teacher, stage=2), relufied(teacher, stage=2)
    first = finetune(whole, settings, windows_of(), teacher=teacher)
    second = finetune(parts, with_changes(settings, accumulate=4), windows_of(), teacher=teacher)
    assert second.losses == pytest.approx(first.losses, rel=1e-4)
    for term in ("mismatch", "penalty", "input_penalty"):
        assert [log[term] for log in second.logs] == pytest.approx(
            [log[term] for log in first.logs], rel=1e-4
        )
    assert (weights(whole) - weights(parts)).norm() < 0.02 * (weights(whole) - weights(teacher)).norm()


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_recomputing_changes_memory_not_the_result(teacher, precision: str) -> None:
    settings = with_changes(SHORT, penalty=Penalty(), match_hidden=2.0, precision=precision)
    kept, recomputed = relufied(teacher, stage=2), relufied(teacher, stage=2)
    first = finetune(kept, settings, windows_of(), teacher=teacher)
    again = with_changes(settings, gradient_checkpointing=True)
    second = finetune(recomputed, again, windows_of(), teacher=teacher)
    assert second.losses == first.losses and torch.equal(weights(kept), weights(recomputed))
    assert not any(getattr(module, "gradient_checkpointing", False) for module in recomputed.modules())


def test_bf16_is_close_and_leaves_a_model_in_f32(teacher) -> None:
    settings = with_changes(SHORT, penalty=Penalty(), match_hidden=2.0, distill=0.5, log_steps=1)
    exact, model = relufied(teacher, stage=2), relufied(teacher, stage=2)
    expected = finetune(exact, settings, windows_of(), teacher=teacher)
    found = finetune(model, with_changes(settings, precision="bf16"), windows_of(), teacher=teacher)
    assert found.losses == pytest.approx(expected.losses, rel=3e-2) and found.losses != expected.losses
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    same = relufied(teacher, stage=2)
    same.load_state_dict(model.state_dict())
    ids = torch.from_numpy(windows_of())
    assert torch.equal(model(ids).logits, same(ids).logits), "computes in its own type again"


def test_terms_of_weight_zero_change_nothing(teacher) -> None:
    one, other = relufied(teacher, stage=2), relufied(teacher, stage=2)
    nothing = Penalty(strength=(0.0,))
    first = finetune(one, SHORT, windows_of(), teacher=teacher)
    weightless = with_changes(SHORT, penalty=nothing, input_penalty=nothing, match_hidden=0.0)
    second = finetune(other, weightless, windows_of(), teacher=teacher)
    assert first.losses == second.losses and torch.equal(weights(one), weights(other))


def test_thirty_steps_with_a_penalty_lower_the_density(teacher) -> None:
    def zeros(**changes) -> float:
        model = relufied(teacher)
        settings = with_changes(SHORT, steps=30, distill=0.0, learning_rate=1e-2, **changes)
        logs = finetune(model, settings, windows_of()).logs
        return sum(logs[-1]["sparsity"]["neuron"]) / 2

    plain = zeros()
    assert zeros(penalty=Penalty(strength=(10.0,))) > plain + 0.1
    assert zeros(penalty=Penalty(target=0.9)) > plain + 0.02, "the controller takes its time"


class Interruption(Exception):
    pass


def interrupt_at(step: int):
    def on_log(log: dict) -> None:
        if log["step"] == step:
            raise Interruption

    return on_log


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_is_an_unbroken_run(teacher, tmp_path: Path, accumulate: int) -> None:
    settings = with_changes(SHORT, accumulate=accumulate)
    unbroken, resumed = relufied(teacher, stage=2), relufied(teacher, stage=2)
    expected = finetune(unbroken, settings, windows_of(), teacher=teacher)
    with pytest.raises(Interruption):
        finetune(
            resumed, settings, windows_of(), teacher=teacher, output=tmp_path / "out", on_log=interrupt_at(5)
        )
    assert not (tmp_path / "out").exists()
    seen: list[dict] = []
    fresh = relufied(teacher, stage=2)
    found = finetune(
        fresh,
        settings,
        windows_of(),
        teacher=teacher,
        output=tmp_path / "out",
        resume=True,
        on_log=seen.append,
    )
    assert [log["step"] for log in seen] == [5, 6]
    assert found.losses == expected.losses
    assert torch.equal(weights(fresh), weights(unbroken))
    remove_checkpoints(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_without_its_state_does_not_count(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"global_step": int(name[11:])}))
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text('{"global_')
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_only_the_very_same_run_is_resumed(teacher, tmp_path: Path) -> None:
    def run(settings: Finetune = SHORT, windows: np.ndarray | None = None, resume: bool = False) -> None:
        text = windows_of() if windows is None else windows
        finetune(relufied(teacher), settings, text, teacher=teacher, output=tmp_path / "out", resume=resume)

    with pytest.raises(UserError, match="no checkpoint to resume from"):
        run(resume=True)
    run()
    with pytest.raises(UserError, match="holds checkpoints of an unfinished run"):
        run()
    with pytest.raises(UserError, match=r"a run with learning_rate 0\.003, not 0\.1"):
        run(with_changes(SHORT, learning_rate=0.1), resume=True)
    with pytest.raises(UserError, match="a run with another text"):
        run(windows=windows_of()[::-1].copy(), resume=True)
    run(resume=True)


def test_divergence_stops_before_the_model_is_ruined(teacher, tmp_path: Path) -> None:
    model, kept = relufied(teacher), {}

    def poison(log: dict) -> None:
        if log["step"] == 4:
            kept["weights"] = weights(model).clone()
            with torch.no_grad():
                teacher.lm_head.weight[0] = float("nan")

    with pytest.raises(UserError, match=r"diverged at step 5 .*lower learning_rate.*checkpoint-4"):
        finetune(model, SHORT, windows_of(), teacher=teacher, output=tmp_path / "out", on_log=poison)
    assert torch.equal(weights(model), kept["weights"]) and torch.isfinite(weights(model)).all()
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())
    last = last_checkpoint(checkpoint_folder(tmp_path / "out"))
    assert last is not None and json.loads((last / "trainer_state.json").read_text())["global_step"] == 4


@pytest.mark.parametrize(
    ("settings", "windows", "message"),
    [
        (SHORT, windows_of(0), "at least one window"),
        (SHORT, windows_of(length=9), "windows of 8 tokens, found 9"),
        (SHORT, windows_of() + 53, "vocabulary of 53"),
    ],
    ids=["empty", "another length", "another tokenizer"],
)
def test_unfit_windows_are_refused(teacher, settings: Finetune, windows: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        finetune(relufied(teacher), settings, windows, teacher=teacher)


def test_windows_longer_than_the_model_s_positions_are_refused(teacher) -> None:
    longest = teacher.config.max_position_embeddings
    windows = np.zeros((4, longest + 1), dtype=np.int64)
    with pytest.raises(UserError, match=f"longer than the {longest}"):
        finetune(teacher, with_changes(SHORT, window=longest + 1, distill=0.0), windows)


def test_an_unfit_teacher_is_refused(teacher) -> None:
    model = relufied(teacher)
    with pytest.raises(UserError, match="need the dense original"):
        finetune(model, SHORT, windows_of())
    with pytest.raises(UserError, match="need the dense original"):
        finetune(model, with_changes(SHORT, distill=0.0, match_hidden=1.0), windows_of())
    with pytest.raises(UserError, match="the very model to be trained"):
        finetune(model, SHORT, windows_of(), teacher=model)
    with pytest.raises(UserError, match="without an output folder"):
        finetune(model, SHORT, windows_of(), teacher=teacher, resume=True)


def test_compiled_training_takes_the_same_steps_and_reports_the_same_zeros(teacher, monkeypatch) -> None:
    """With the compiler's own tracing but without its code generation, which takes a minute."""
    monkeypatch.setattr("relufy.train.arguments.COMPILER", "aot_eager")
    penalty = Penalty(strength=(0.0, 1.0, 1.0), until=(0.1, 0.5, 1.0), target=0.8)
    settings = with_changes(SHORT, distill=0.0, log_steps=3, penalty=penalty)
    found = {}
    for is_compiled in (False, True):
        model = relufied(teacher)
        torch._dynamo.utils.counters.clear()
        result = finetune(model, with_changes(settings, compile=is_compiled), windows_of())
        frames = torch._dynamo.utils.counters["frames"]["ok"]
        assert (frames > 0) == is_compiled, "the steps between reports run compiled"
        found[is_compiled] = weights(model), result.logs
    torch.testing.assert_close(found[True][0], found[False][0], rtol=1e-5, atol=1e-6)
    for compiled, plain in zip(found[True][1], found[False][1], strict=True):
        assert compiled["sparsity"]["neuron"] == pytest.approx(plain["sparsity"]["neuron"])
        assert compiled["penalty"] == pytest.approx(plain["penalty"], rel=1e-5)
