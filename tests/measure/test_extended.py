"""`relufy measure extended` and `relufy measure law`: documents, tables, and reasons for what is left out."""

import json
from pathlib import Path

import numpy as np
import pytest

from relufy.cli.main import run
from relufy.document import read_document
from relufy.errors import UserError
from relufy.measure.extended import DEFINITIONS, PARTS, ExtendedOptions, extended
from relufy.measure.laws import Falling


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("It was a dark and stormy night, and the rain fell in torrents. " * 4)
    return path


def test_the_document(
    make_checkpoint, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["measure", "extended", str(make_checkpoint("stage1")), "--text", str(text), "--window", "32"]
    options = ["--only", "predictivity,coactivation,energy", "--rank", "8", "--event", "2", "--json"]
    assert run([*arguments, *options]) == 0
    path = tmp_path / "found.json"
    path.write_text(capsys.readouterr().out)
    found = read_document(path, "relufy.measure.extended")
    assert found["notes"] == [] and found["cett"] is None and found["ppl_sparsity"] is None
    assert found["energy"]["constants"]["event"] == 2 and 1 < found["energy"]["ratio"] < 2
    assert len(found["coactivation"]["gap"]) == 2 and found["predictivity"]["rank"] == 8
    assert set(found["definitions"]) == set(DEFINITIONS)


def test_cett_and_ppl_sparsity(make_checkpoint, text: Path) -> None:
    options = ExtendedOptions(("cett", "ppl_sparsity"), percents=(1.0, 5.0), criteria=("topk",))
    found = extended(make_checkpoint("stage1"), text, 32, 4, options).to_json()
    assert [(one["percent"], one["criterion"]) for one in found["ppl_sparsity"]] == [(1, "topk"), (5, "topk")]
    assert all(one["ratio"] <= 1 + one["percent"] / 100 for one in found["ppl_sparsity"])
    assert len(found["cett"]["sparsity"]) == 2 and found["energy"] is None
    assert set(PARTS) <= set(found)


def test_what_a_dense_model_cannot_have_has_its_reason(make_checkpoint, text: Path) -> None:
    options = ExtendedOptions(parts=("predictivity", "energy"))
    found = extended(make_checkpoint(), text, 32, options=options).found
    assert (
        found.predictivity is None
        and found.cett is None
        and found.notes[0].startswith("predictivity: no layer")
    )
    assert found.energy is not None and found.energy.ratio == pytest.approx(1, abs=0.01)
    with pytest.raises(UserError, match="no layer has zeros"):
        extended(make_checkpoint(), text, 32, options=ExtendedOptions(parts=("predictivity",)))
    with pytest.raises(UserError, match="no part 'ppl'"):
        ExtendedOptions(parts=("ppl",))


def test_tables(make_checkpoint, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["measure", "extended", str(make_checkpoint("stage1")), "--text", str(text), "--window", "32"]
    assert run([*arguments, "--only", "cett, coactivation,energy"]) == 0
    printed = capsys.readouterr().out
    assert "CETT 0.2" in printed and "if independent" in printed and "x less" in printed
    assert "predictors of rank" not in printed


def test_the_law_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    law = Falling(0.8, -1.2, 300.0, 0.1)
    logs = [
        {"step": i, "tokens": int(t), "sparsity": {"neuron": [1 - float(law.at(t / 1e9))] * 2}}
        for i, t in enumerate(np.geomspace(1e5, 2e7, 60))
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(log) + "\n" for log in logs))
    assert run(["measure", "law", str(tmp_path), "--skip", "0", "--average", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    falling, rising = found["laws"]
    assert falling["name"] == "falling" and falling["error"] < 1e-3 < rising["error"]
    assert falling["limit"] == pytest.approx(0.1, abs=0.01) and len(found["active"]) == 30
    assert run(["measure", "law", str(tmp_path)]) == 2
    assert "6 points or more" in capsys.readouterr().err
    assert run(["measure", "law", str(tmp_path / "none")]) == 2
    assert "train with --log" in capsys.readouterr().err
