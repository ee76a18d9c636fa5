"""`relufy measure overtime`: one document with all curves, and what is refused."""

import json
from pathlib import Path

import pytest

from relufy.cli.main import run
from relufy.document import read_document
from relufy.errors import UserError
from relufy.measure.overtime import DEFINITIONS, overtime


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("It was a dark and stormy night, and the rain fell in torrents. " * 8)
    return path


def test_the_document(
    make_checkpoint, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_checkpoint("stage1")
    arguments = ["measure", "overtime", str(folder), "--text", str(text), "--window", "48", "--warmup", "8"]
    options = ["--gammas", "2,4", "--reuse-windows", "1,3", "--reset", "--json"]
    assert run([*arguments, *options]) == 0
    path = tmp_path / "found.json"
    path.write_text(capsys.readouterr().out)
    found = read_document(path, "relufy.measure.overtime")
    assert json.loads(path.read_text()) == found
    assert found["tokens"] == found["windows"] * 47 and found["skipped"] == 1
    curves = found["aggregated"]
    assert curves["tokens"] == list(range(1, 48)) and curves["windows"][0] == found["windows"]
    for name in ("measured", "independent", "uniform"):
        assert len(curves[name]["mean"]) == 47 and len(curves[name]["layers"]) == 2
    assert curves["measured"]["mean"] == sorted(curves["measured"]["mean"], reverse=True)
    assert found["reuse"]["windows"] == [1, 3] and len(found["reuse"]["measured"]["mean"]) == 2
    assert [(p["kind"], p["gamma"]) for p in found["gamma"]["points"]] == [
        (kind, gamma) for kind in ("reuse", "random") for gamma in (2, 4)
    ]
    assert found["gamma"]["reset"] is True and set(found["definitions"]) == set(DEFINITIONS)


def test_it_prints_tables(make_checkpoint, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_checkpoint("stage1")
    found = overtime(folder, text, 48, max_windows=2, reuse_windows=(1,), gammas=(4,), warmup=8)
    options = ["--window=48", "--max-windows=2", "--reuse-windows=1", "--gammas=4", "--warmup=8"]
    assert run(["measure", "overtime", str(folder), "--text", str(text), *options]) == 0
    printed = capsys.readouterr().out
    assert f"{found.aggregated.at(16):.2%}" in printed and "gamma: " in printed
    assert f"{found.gamma.points[0].perplexity.perplexity:.2f}" in printed


def test_what_cannot_be_asked(make_checkpoint, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"no site 'gate'.*among down, neuron"):
        overtime(make_checkpoint("stage1"), text, 32, site="gate", reuse_windows=(1,))
    with pytest.raises(UserError, match="no token of a window of 32 has 64 before it"):
        overtime(make_checkpoint("stage1"), text, 32)
    arguments = ["measure", "overtime", str(make_checkpoint("stage1")), "--text", str(text)]
    assert run([*arguments, "--gammas", "1;2"]) == 2
    assert "--gammas takes whole numbers" in capsys.readouterr().err
