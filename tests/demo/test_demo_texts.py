"""The demo's windows of the user's text: disjoint, ordered, and refused when there are too few."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from relufy.demo.texts import NUM_TEST_WINDOWS, prepare
from relufy.demo.watch import Silent
from relufy.errors import UserError
from relufy.recipe import Finetune

WINDOW = 9
BODY = WINDOW - 1


class Words:
    """A tokenizer whose tokens are the numbers that the text spells out."""

    bos_token_id = 0

    def __call__(self, text: str, **_options: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[int(word) for word in text.split()])


def windows_of(folder: Path, num_windows: int) -> Any:
    text = folder / "numbers.txt"
    text.write_text(" ".join(str(number) for number in range(1, num_windows * BODY + 1)))
    return prepare(None, Words(), Finetune(window=WINDOW), text, Silent())  # type: ignore[arg-type]


@pytest.mark.parametrize("num_windows", [3, 17, 50, 2000])
def test_held_out_windows_are_the_end_and_apart(tmp_path: Path, num_windows: int) -> None:
    found = windows_of(tmp_path, num_windows)
    assert len(found.train) + len(found.test) == num_windows
    assert 2 <= len(found.test) <= NUM_TEST_WINDOWS
    assert found.train[:, 1:].max() < found.test[:, 1:].min()
    assert np.all(found.test[:, 0] == 0)
    assert found.about.overlap["identical_windows"] == 0


def test_text_of_too_few_windows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs 3 or more"):
        windows_of(tmp_path, 2)


def test_the_overlap_is_said(tmp_path: Path) -> None:
    assert "0 of the 2 held-out windows" in windows_of(tmp_path, 17).about.description
