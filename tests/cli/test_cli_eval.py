"""`relufy eval` on the bundled model: one JSON document on stdout, a table for people, refusals."""

import json
from pathlib import Path

import pytest
from tests.cli.test_cli_errors import refused

from relufy.cli.main import run

pytest.importorskip("lm_eval")


def test_json_is_all_of_stdout(task_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "eval.json"
    arguments = ["eval", "bundled", "--before", "bundled", "--tasks", "tiny_endings, tiny_words"]
    arguments += ["--task-folder", str(task_folder), "--backend", "engine", "--threads", "1"]
    assert run([*arguments, "-o", str(output), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(output.read_text()) and document["kind"] == "relufy.eval"
    assert [row["name"] for row in document["tasks"]] == ["tiny_endings", "tiny_endings", "tiny_words"]
    assert document["options"]["tasks"] == ["tiny_endings", "tiny_words"]


def test_people_see_a_table_and_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The captain looked at the sea, and the sea looked back at him.\n" * 20)
    arguments = ["eval", "bundled", "--text", str(text), "--window", "64", "--max-windows", "3"]
    assert run([*arguments, "--before", "bundled", "--backend", "engine", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert "text, perplexity per token: no difference seen (could have seen 0)" in printed
    assert "perplexity per word: exp of all loss over its words" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to evaluate on"),
        (["--text", "nowhere.txt"], "no text file nowhere.txt"),
        (["--text", "x", "--backend", "gpu"], "no backend 'gpu'"),
        (["--text", "x", "--dtype", "int8"], "dtype belongs to the backend engine"),
        (["--tasks", "x", "--task-folder", "nowhere"], "no task folder nowhere"),
        (["--tasks", "x", "--limit", "0"], "--limit"),
    ],
)
def test_refusals(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, "eval", "bundled", *arguments)
