"""The benchmark of measuring itself: what it says, on the smallest shape."""

import json

import pytest

from relufy.cli.main import run


def test_plain_and_measured_passes_are_timed(tmp_path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    output = tmp_path / "found.json"
    sizes = ["--shape", "tiny", "--windows", "2", "--window", "8", "--batch-size", "1", "--turns", "1"]
    assert run(["bench", "measure", *sizes, "-o", str(output)]) == 0
    assert "time over plain" in capsys.readouterr().out
    found = json.loads(output.read_text())
    assert (found["kind"], found["benchmark"]) == ("relufy.bench", "measure")
    assert [len(times) for times in found["seconds"].values()] == [2, 2]
    warm = {name: times[1] for name, times in found["seconds"].items()}
    assert found["overhead"] == warm["measure"] / warm["plain"]
    assert found["tokens_per_second"] == 16 / warm["measure"]
