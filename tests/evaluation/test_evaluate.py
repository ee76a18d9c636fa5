"""Evaluating from end to end on tasks of our own: one model, two models, both backends, groups, refusals."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import relufy
from relufy import EvalOptions, UserError

pytest.importorskip("lm_eval")

from tests.evaluation.local_tasks import SENTENCES, TASKS


@pytest.fixture(scope="module")
def stage1(bundled, tmp_path_factory) -> Path:
    model = relufy.sparsify(relufy.load_model(bundled), "relufy-stage1")
    folder = tmp_path_factory.mktemp("models") / "stage1"
    return relufy.save_checkpoint(model, relufy.load_tokenizer(bundled), folder)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(SENTENCES * 5))
    return file


def options(folder: Path, **fields: Any) -> EvalOptions:
    wanted = {"backend": "engine", "task_folders": (folder,), "threads": 1, "window": 64} | fields
    if wanted["backend"] == "hf":
        del wanted["threads"]
    return EvalOptions(**wanted)


@pytest.mark.parametrize("backend", ["hf", "engine"])
def test_two_models_side_by_side(bundled, stage1, text, task_folder, backend: str) -> None:
    found = relufy.evaluate(stage1, bundled, text, TASKS, options(task_folder, backend=backend))
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["kind"] == "relufy.eval" and "lm_eval" in document["versions"]
    rows = {(row["name"], row["metric"]): row for row in document["tasks"]}
    assert {name for name, _ in rows} == set(TASKS)
    assert {metric for name, metric in rows if name == "tiny_rolling"} == {
        "word_perplexity", "byte_perplexity", "bits_per_byte",
    }  # fmt: skip
    assert all(row["verdict"] and 0 < row["p"] <= 1 for row in rows.values())
    for row in rows.values():
        assert row["difference"] == pytest.approx(row["after"]["value"] - row["before"]["value"])
        assert row["num_docs"] == 6 and row["before"]["standard_error"] is not None
    assert rows["tiny_endings", "acc"]["chance"] == pytest.approx(1 / 3)
    assert rows["tiny_endings", "acc"]["constant_answer"] is None
    assert rows["tiny_answers", "acc"]["constant_answer"] == pytest.approx(5 / 6)
    perplexity = document["text"]["rows"][0]
    assert perplexity["metric"] == "perplexity per token" and perplexity["difference"] > 0
    assert document["text"]["bytes"] == text.stat().st_size and document["run"]["backend"] == backend
    assert found.to_markdown().count("\n| ") > len(rows)


def test_both_backends_agree_on_every_task(stage1, text, task_folder) -> None:
    documents = [
        relufy.evaluate(stage1, None, text, TASKS, options(task_folder, backend=backend)).to_json()
        for backend in ("hf", "engine")
    ]
    theirs, ours = ([*document["text"]["rows"], *document["tasks"]] for document in documents)
    for a, b in zip(theirs, ours, strict=True):
        assert a["after"]["value"] == pytest.approx(b["after"]["value"], rel=1e-3)
        assert a["after"]["standard_error"] == pytest.approx(b["after"]["standard_error"], rel=1e-3)
        assert a["before"] is a["difference"] is a["p"] is None and a["verdict"] == b["verdict"]


def test_a_model_beside_itself_shows_no_difference(bundled, text, task_folder) -> None:
    found = relufy.evaluate(bundled, bundled, text, TASKS, options(task_folder))
    assert all(row.test and row.test.difference == 0 and row.test.p == 1 for row in found.rows())
    assert not any("higher" in row.verdict or "lower" in row.verdict for row in found.rows())


def test_a_packed_file_and_a_group(bundled, task_folder, tmp_path) -> None:
    packed = relufy.pack(bundled, tmp_path / "bundled.relufy", "int8")
    found = relufy.evaluate(packed, bundled, tasks="tiny_group", options=options(task_folder, limit=4))
    rows = [(row.name, row.group, len(row.after.items)) for row in found.task_rows]
    assert rows == [
        ("tiny_group", None, 8),
        ("tiny_endings", "tiny_group", 4),
        ("tiny_endings", "tiny_group", 4),
        ("tiny_answers", "tiny_group", 4),
    ]
    assert found.facts["dtype"] == "int8" and found.before_facts and found.before_facts["dtype"] == "f32"


def test_examples_in_the_prompts_are_the_same_for_both(bundled, stage1, task_folder) -> None:
    found = relufy.evaluate(
        stage1, bundled, tasks="tiny_last", options=options(task_folder, num_fewshot=2)
    ).task_rows[0]
    alone = relufy.evaluate(bundled, tasks="tiny_last", options=options(task_folder)).task_rows[0]
    assert found.before and found.test and found.before.documents == found.after.documents
    assert found.before.documents != alone.after.documents


def test_masks_that_spare_prompts_are_named(bundled, text, tmp_path) -> None:
    from relufy.activation_sparsity import ActivationSparsity, Sparsifier
    from relufy.model.sparsifiers import apply_sparsity

    mask = Sparsifier(("neuron",), "topk", k=100, phase="decode")
    model = apply_sparsity(relufy.load_model(bundled), ActivationSparsity((mask,)))
    folder = relufy.save_checkpoint(model, relufy.load_tokenizer(bundled), tmp_path / "decode")
    for backend in ("engine", "hf"):
        found = relufy.evaluate(folder, bundled, text, options=EvalOptions(backend=backend, window=64))  # type: ignore[arg-type]
        assert "the masks at neuron leave prompts dense" in found.notes[0]
        assert found.text_rows[0].test and abs(found.text_rows[0].test.difference) < 1e-3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "nothing to evaluate on"),
        ({"text": "nowhere.txt"}, "no text file nowhere.txt"),
    ],
)
def test_refusals(bundled, task_folder, arguments: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        relufy.evaluate(bundled, **arguments, options=options(task_folder))


def test_an_unknown_task_is_refused_and_a_like_one_named(bundled, task_folder, monkeypatch) -> None:
    from lm_eval import tasks

    manager = tasks.TaskManager

    def without_own_tasks(include_path: Any, include_defaults: bool = True) -> Any:
        return manager(include_path=include_path, include_defaults=False)  # indexing them takes ten seconds

    monkeypatch.setattr(tasks, "TaskManager", without_own_tasks)
    with pytest.raises(UserError, match=r"there is no task 'tiny_ending'.*tiny_endings"):
        relufy.evaluate(bundled, tasks="tiny_ending", options=options(task_folder))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"backend": "tpu"}, "no backend 'tpu': choose hf or engine"),
        ({"dtype": "int8"}, "dtype belongs to the backend engine"),
        ({"backend": "engine", "device": "cuda"}, "device belongs to the backend hf"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"window": 1}, "at least 2 tokens"),
        ({"level": 1.0}, "between 0 and 1"),
    ],
)
def test_options_that_cannot_be(fields: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        EvalOptions(**fields)


def test_damaged_tasks_and_data_are_named(bundled, task_folder) -> None:
    (task_folder / "tiny_endings.jsonl").unlink()
    with pytest.raises(UserError, match=r"tiny_endings: could not be loaded .*--task-folder"):
        relufy.evaluate(bundled, tasks="tiny_endings", options=options(task_folder))
    with pytest.raises(UserError, match="no task folder"):
        relufy.evaluate(bundled, tasks="tiny_endings", options=options(task_folder / "none"))


def test_windows_longer_than_the_model_are_refused(bundled, text, task_folder) -> None:
    with pytest.raises(UserError, match="windows of 1024 tokens are longer than the 512"):
        relufy.evaluate(bundled, text=text, options=options(task_folder, window=1024))


def test_a_packed_file_needs_the_engine(bundled, text, tmp_path) -> None:
    packed = relufy.pack(bundled, tmp_path / "bundled.relufy")
    with pytest.raises(UserError, match="which only the engine runs"):
        relufy.evaluate(packed, text=text)


def test_the_engine_needs_no_torch(bundled, text, task_folder) -> None:
    program = (
        "import sys, relufy; from relufy import EvalOptions\n"
        f"options = EvalOptions('engine', ({str(task_folder)!r},), window=64, threads=1)\n"
        f"relufy.evaluate({str(bundled)!r}, {str(bundled)!r}, {str(text)!r}, {TASKS!r}, options)\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
