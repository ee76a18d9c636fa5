"""The log of a run: every report a line at once, and resumed without the steps that were lost."""

import json
import sys
from pathlib import Path

import pytest

from relufy.errors import UserError
from relufy.train.logbook import LOG_FILE, Logbook, read_log, scalars


def report(step: int) -> dict:
    return {"step": step, "loss": 1 / step, "sparsity": {"neuron": [0.5, 0.75]}, "dead": [0.0, 0.01]}


def events(folder: Path) -> dict[str, dict[int, float]]:
    """Return what TensorBoard shows: tag -> step -> value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=True).Reload()
    return {tag: {e.step: e.value for e in found.Scalars(tag)} for tag in found.Tags()["scalars"]}


def test_each_report_is_a_line_at_once(tmp_path: Path) -> None:
    with Logbook(tmp_path / "run") as logbook:
        for step in (1, 2):
            logbook.write(report(step))
            lines = (tmp_path / "run" / LOG_FILE).read_text().splitlines()
            assert [json.loads(line) for line in lines] == [report(s) for s in range(1, step + 1)]


def test_a_resumed_log_is_an_unbroken_one(tmp_path: Path) -> None:
    with Logbook(tmp_path) as logbook:
        for step in (1, 2, 3):
            logbook.write(report(step))
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write('{"step": 4, "lo')
    with Logbook(tmp_path) as logbook:
        logbook.resume_at(2)
        logbook.write(report(3))
    assert read_log(tmp_path / LOG_FILE) == [report(1), report(2), report(3)]
    assert [path.name for path in tmp_path.iterdir()] == [LOG_FILE]


def test_resuming_at_the_start_begins_anew(tmp_path: Path) -> None:
    with Logbook(tmp_path) as logbook:
        logbook.write(report(1))
    with Logbook(tmp_path) as logbook:
        logbook.resume_at(0)
    assert read_log(tmp_path / LOG_FILE) == []


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    with Logbook(tmp_path) as logbook:
        logbook.write({"step": 1, "loss": float("nan"), "dead": [float("inf"), 1.0]})
    assert read_log(tmp_path / LOG_FILE) == [{"step": 1, "loss": None, "dead": [None, 1.0]}]


def test_what_can_be_drawn() -> None:
    found = dict(
        scalars({"step": 3, "loss": 2.0, "note": "text", "empty": []} | {"sparsity": {"q": [0.2, 0.4]}})
    )
    assert found == {
        "loss": 2.0,
        "sparsity/q": pytest.approx(0.3),
        "sparsity/q/layer_0": 0.2,
        "sparsity/q/layer_1": 0.4,
    }


def test_events_without_the_package_are_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r"relufy\[tensorboard\]"):
        Logbook(tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_events_are_tensorboards(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with Logbook(tmp_path, tensorboard=True) as logbook:
        for step in (1, 2, 3):
            logbook.write(report(step))
    with Logbook(tmp_path, tensorboard=True) as logbook:
        logbook.resume_at(2)
        logbook.write(report(3) | {"loss": 7.0})
    found = events(tmp_path)
    assert found["loss"] == {1: 1.0, 2: 0.5, 3: 7.0}
    assert found["sparsity/neuron/layer_1"] == {1: 0.75, 2: 0.75, 3: 0.75}
    assert found["dead"][1] == pytest.approx(0.005)
