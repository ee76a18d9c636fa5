"""Text files become windows of tokens, whole and in order; what is no text is refused."""

import gzip
from types import SimpleNamespace

import numpy as np
import pytest

from relufy import text as text_file
from relufy.errors import UserError
from relufy.text import TextWindows, read_text, read_windows, token_windows


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


def test_windows_hold_the_text_in_order_behind_bos():
    windows = token_windows("abcdefgh", encode, 4, bos=0)
    assert windows.dtype == np.int64
    assert windows.tolist() == [[0, *encode("abc")], [0, *encode("def")]]
    assert token_windows("abcdefgh", encode, 4, bos=None).tolist() == [encode("abcd"), encode("efgh")]


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(UserError, match="2 tokens, fewer than one window of 3"):
        token_windows("ab", encode, 4, bos=0)


def test_files_are_joined_and_unpacked(tmp_path):
    (tmp_path / "a.txt").write_text("one \u00e9")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"two"))
    assert read_text([tmp_path / "a.txt", tmp_path / "b.txt.gz"]) == "one \u00e9\ntwo"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"  \n", "no text"),
        ("latin.txt", b"caf\xe9", "not UTF-8"),
        ("bad.gz", b"not gzip", "not UTF-8 text in gzip"),
        ("cut.gz", gzip.compress(b"word " * 1000)[:-20], "not UTF-8 text in gzip"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_text([tmp_path / name])
    with pytest.raises(UserError, match="there is no text file"):
        read_text([tmp_path / "missing.txt"])


class Letters:
    """A tokenizer of one token per character."""

    bos_token_id: int | None = 0

    def __call__(self, text: str, **_: bool):
        return SimpleNamespace(input_ids=encode(text))


@pytest.mark.parametrize("bos", [0, None])
def test_windows_are_read_while_they_are_asked_for(tmp_path, monkeypatch, bos) -> None:
    monkeypatch.setattr(text_file, "PIECE", 10)
    monkeypatch.setattr(Letters, "bos_token_id", bos)
    contents = ["one two\nthree\n\nfour five six seven eight nine\n ten", "x" * 35 + "\ny\n"]
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(content)
    windows = TextWindows(paths, Letters(), 7)
    whole = "\n".join(contents)
    assert np.array_equal(list(windows), token_windows(whole, encode, 7, bos))
    assert np.array_equal(read_windows(paths, Letters(), 7), token_windows(whole, encode, 7, bos))
    assert windows.left_out == len(whole) % (7 if bos is None else 6)


def test_pieces_end_where_a_line_follows_a_line(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(text_file, "PIECE", 10)
    path = tmp_path / "a.txt"
    path.write_text("one two\nthree\n\nfour\nfive six\n seven\n\n\n\n\n\neight\nnine")
    assert list(text_file._pieces([path])) == [
        "one two\nthree\n\nfour\n",
        "five six\n seven\n\n\n\n\n",
        "\neight\nnine",
    ]


def test_too_little_to_stream_is_refused(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("ab")
    (tmp_path / "b.txt").write_text("  \n")
    with pytest.raises(UserError, match="2 tokens, fewer than one window of 3"):
        read_windows([tmp_path / "a.txt"], Letters(), 4)
    with pytest.raises(UserError, match="no text in"):
        read_windows([tmp_path / "b.txt"], Letters(), 2)
