"""`relufy compare` end to end: a folder with everything, one JSON document, one line when refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from relufy.cli.main import run


@pytest.fixture
def arguments(make_checkpoint: Callable[..., Path], tmp_path: Path) -> list[str]:
    generator = np.random.default_rng(0)
    words = [str(tmp_path / "test.txt"), str(tmp_path / "calibration.txt")]
    for file in words:
        Path(file).write_text(" ".join(map(str, generator.integers(0, 10**6, 400))))
    given = ["compare", str(make_checkpoint()), "--text", words[0], "--calibration", words[1]]
    return [*given, "--window", "32", "--max-windows", "4", "--calibration-tokens", "1024"]


def test_it_writes_the_folder_and_prints_tables(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "found"
    assert run([*arguments, "--methods", "cats, scap", "--targets", "0.2,0.35", "-o", str(output)]) == 0
    names = {file.name for file in output.iterdir()}
    assert names == {"compare.json", "compare.md", "compare.png", "compare.svg"}
    document = json.loads((output / "compare.json").read_text())
    assert len(document["rows"]) == 4
    assert document["command"].startswith("relufy compare") and "--methods cats,scap" in document["command"]
    printed = capsys.readouterr()
    assert "Quality" in printed.out and "gate_only_sparsity:" in printed.out
    assert "variants: 4/4" in printed.err


def test_the_command_in_the_document_repeats_it(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*arguments, "--methods", "scap", "--targets", "0.2", "--no-controls", "--json"]
    given += ["--set", "scap.centre=zero", "--seed", "1"]
    assert run(given) == 0
    first = json.loads(capsys.readouterr().out)
    assert run([*first["command"].split()[1:], "--json"]) == 0
    second = json.loads(capsys.readouterr().out)
    for document in (first, second):
        for row in document["rows"]:
            row.pop("seconds")
    assert first == second


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--methods", "teel"], "did you mean 'teal'"),
        (["--targets", "2"], "between 0 and 1"),
        (["--targets", "half"], "--targets takes shares"),
        (["--methods", "cats", "--targets", "0.9"], "cats cannot leave 90%"),
        (["--set", "teal=uniform"], "--set takes METHOD.KEY=VALUE"),
        (["--mode", "some"], "no mode 'some'"),
    ],
)
def test_a_refusal_is_one_line_and_writes_nothing(
    arguments: list[str], tmp_path: Path, changes: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "found"
    assert run([*arguments, "-o", str(output), *changes]) == 2
    lines = [
        line for line in capsys.readouterr().err.splitlines() if ": 0/" not in line and ": 1/" not in line
    ]
    assert words in lines[-1]
    assert not output.exists() and "Traceback" not in "".join(lines)
