"""Windows drawn from texts: the whole text counts, chats go through the template, and memory stays flat."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from relufy import text_sample
from relufy.errors import UserError
from relufy.text_sample import sample_windows


class Letters:
    """A tokenizer of single characters."""

    bos_token_id: int | None = 1
    chat_template: str | None = "yes"

    def __call__(self, text: str, **_options) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(letter) for letter in text])

    def apply_chat_template(self, messages: list, tokenize: bool) -> str:
        assert not tokenize
        return "".join(f"<{m['role']}>{m['content']}\n" for m in messages)


def write(folder: Path, text: str, name: str = "a.txt") -> Path:
    file = folder / name
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return file


def text_of(windows: np.ndarray) -> str:
    return "".join(map(chr, windows[:, 1:].flatten()))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize("piece", [7, 1 << 18])
def test_all_of_a_short_text_is_there_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, piece: int
) -> None:
    monkeypatch.setattr(text_sample, "PIECE", piece)
    text = "".join(f"line {i}: \u00e4\u4e2d\n" for i in range(30))
    windows = sample_windows([write(tmp_path, text, name)], Letters(), 5, count=10_000)
    assert text_of(windows) == text[: len(text) // 4 * 4]
    assert (windows[:, 0] == 1).all()


def test_windows_are_drawn_from_all_of_the_text(tmp_path: Path) -> None:
    text = "".join(f"{i:04d}" for i in range(1000))
    first = sample_windows([write(tmp_path, text)], Letters(), 5, count=20, seed=3)
    numbers = [int(text_of(first[i : i + 1])) for i in range(20)]
    assert numbers == sorted(numbers) and numbers[0] < 300 and numbers[-1] > 700
    assert np.array_equal(first, sample_windows([write(tmp_path, text)], Letters(), 5, count=20, seed=3))
    assert not np.array_equal(first, sample_windows([write(tmp_path, text)], Letters(), 5, count=20, seed=4))


def test_every_window_is_as_likely(tmp_path: Path) -> None:
    file = write(tmp_path, "".join(f"{i:04d}" for i in range(40)))
    counts = np.zeros(40)
    for seed in range(400):
        for window in sample_windows([file], Letters(), 5, count=10, seed=seed):
            counts[int(text_of(window[None]))] += 1
    assert counts.min() > 60 and counts.max() < 140  # 100 expected, 8.7 the standard deviation


def test_chats_go_through_the_template(tmp_path: Path) -> None:
    records = [
        {"messages": [{"role": "user", "content": "hi"}]},
        {"prompt": "a", "response": "b"},
        {"text": "plain"},
    ]
    file = write(tmp_path, "\n".join(map(json.dumps, records)), "chat.jsonl")
    tokenizer = Letters()
    tokenizer.bos_token_id = None
    windows = sample_windows([file], tokenizer, 2, count=99)
    assert "".join(map(chr, windows.flatten())) == "<user>hi\n<user>a\n<assistant>b\nplain\n"


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("", "a.txt", "fewer tokens than one window of 5"),
        ("abc", "a.txt", "fewer tokens than one window of 5"),
        ('{"x": 1}', "a.jsonl", "line 1: expected 'text', 'messages'"),
        ("nonsense", "a.jsonl", "line 1: not JSON"),
    ],
)
def test_unfit_files_are_refused(tmp_path: Path, text: str, name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        sample_windows([write(tmp_path, text, name)], Letters(), 5, count=1)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "a.gz").write_bytes(b"no gzip")
    for name, said in (("a.bin", "not UTF-8"), ("a.gz", "in gzip"), ("nowhere", "no text file")):
        with pytest.raises(UserError, match=said):
            sample_windows([tmp_path / name], Letters(), 5, count=1)
    tokenizer = Letters()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        sample_windows([write(tmp_path, '{"messages": []}', "c.jsonl")], tokenizer, 5, count=1)
