"""Text files become windows of tokens, whole and in order; what is no text is refused."""

import gzip

import numpy as np
import pytest

from relufy.errors import UserError
from relufy.text import read_text, token_windows


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
