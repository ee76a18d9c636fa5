"""What results say of themselves, and that nothing else is taken for one."""

import json
import sys

import pytest

from relufy.document import command_line, heading, read_document, versions
from relufy.errors import UserError


def test_the_heading() -> None:
    found = heading("relufy.measure")
    assert list(found) == ["kind", "version", "command", "versions"]
    assert (found["kind"], found["version"]) == ("relufy.measure", 1)
    assert {"python", "relufy", "torch", "transformers"} <= set(found["versions"])
    assert versions(["no such package"]) == {"python": found["versions"]["python"]}


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("/usr/bin/relufy", "relufy measure 'a b'"),
        ("/lib/relufy/__main__.py", "relufy measure 'a b'"),
        ("studies/run.py", "run.py measure 'a b'"),
    ],
)
def test_the_command(program: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [program, "measure", "a b"])
    assert command_line() == expected


def test_a_document_is_read_again(tmp_path) -> None:
    path = tmp_path / "found.json"
    path.write_text(json.dumps(heading("relufy.measure") | {"tokens": 3}))
    assert read_document(path)["tokens"] == read_document(path, "relufy.measure")["tokens"] == 3
    with pytest.raises(UserError, match=r"no result of relufy.eval; its kind is 'relufy.measure'"):
        read_document(path, "relufy.eval")


@pytest.mark.parametrize(("content", "said"), [("{", "JSON"), ("[]", "None"), ('{"kind": 3}', "3")])
def test_other_files_are_refused(content: str, said: str, tmp_path) -> None:
    path = tmp_path / "other.json"
    with pytest.raises(UserError, match="there is no result"):
        read_document(path)
    path.write_text(content)
    with pytest.raises(UserError, match=said):
        read_document(path)
