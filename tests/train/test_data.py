"""What `--data` takes becomes windows, whatever the kind of file; what is no text is refused."""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import Table, parquet
from transformers import PreTrainedTokenizerFast

from relufy.errors import UserError
from relufy.model.checkpoint import load_tokenizer
from relufy.text import read_windows
from relufy.train import data, encoding, texts
from relufy.train.data import Source, open_windows, parse_source
from relufy.train.encoding import cut, token_chunks
from relufy.train.stream import StreamedWindows

ROWS = [{"id": n, "text": f"row {n} \u00e9", "answer": "yes" * n} for n in range(40)]


class Letters:
    """A tokenizer of single characters, the letter's code each; 1 opens texts and 2 ends them."""

    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    chat_template: str | None = "yes"

    def __call__(self, texts: list[str], **_: object) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[[ord(letter) for letter in text] for text in texts])

    def get_vocab(self) -> dict[str, int]:
        return {"\u00ff": 255}

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in messages)


def read_back(*sources: Source | str, **options: object) -> str:
    """Return what all windows say, in the order of the text, "|" for the end of a document."""
    windows = open_windows(sources, Letters(), 3, 0, stream=False, **options).sources[0].ids  # type: ignore[arg-type]
    return "".join(chr(token) for token in windows.ravel()).replace("\x02", "|")


def write_rows(path: Path, rows: list[dict]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        parquet.write_table(Table.from_pylist(rows), path, row_group_size=7)
    elif path.name.endswith(".json"):
        path.write_text(json.dumps(rows))
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


@pytest.fixture(scope="module")
def bundled_tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer("bundled")  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("written", "source"),
    [
        ("book.txt", Source("book.txt")),
        ("book.txt=2", Source("book.txt", 2.0)),
        ("pages.jsonl#body=0.3", Source("pages.jsonl", 0.3, "body")),
        ("q.jsonl#question+answer", Source("q.jsonl", None, "question+answer")),
        ("hub:owner/name:config:split#t=0.7", Source("hub:owner/name:config:split", 0.7, "t")),
        ("a=b.txt", Source("a=b.txt")),
        ("a=b.txt=1e-1", Source("a=b.txt", 0.1)),
        ("x.jsonl#a=b", Source("x.jsonl", None, "a=b")),
    ],
)
def test_sources_are_read(written: str, source: Source):
    assert parse_source(written) == source


def test_what_exists_is_a_path_whatever_its_name(tmp_path):
    (tmp_path / "a#b=1").mkdir()
    name = str(tmp_path / "a#b=1")
    assert parse_source(name) == Source(name)
    assert parse_source(f"{name}=0.5") == Source(name, 0.5)
    assert parse_source(f"{name}#body=0.5") == Source(name, 0.5, "body")


@pytest.mark.parametrize("written", ["a.txt=0", "a.txt=-1", "a.txt=inf", "a.txt=nan"])
def test_weights_are_positive(written: str):
    with pytest.raises(UserError, match=r"weight of a\.txt must be a positive number"):
        parse_source(written)


@pytest.mark.parametrize("written", ["", "=1", "a.jsonl#", "a.jsonl#=1"])
def test_nothing_is_no_source(written: str):
    with pytest.raises(UserError, match="empty path or field"):
        parse_source(written)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "A.JSONL"])
def test_every_kind_of_rows_gives_the_same_text(tmp_path, name: str):
    path = write_rows(tmp_path / name, ROWS)
    assert read_back(str(path)).startswith("row 0 \u00e9|row 1 \u00e9|row 2 \u00e9|")
    assert len(read_back(str(path))) == sum(len(row["text"]) + 1 for row in ROWS) // 2 * 2


def test_fields_are_joined_and_empty_ones_add_nothing(tmp_path):
    rows = [{"q": "a", "r": "b"}, {"q": "c", "r": ""}, {"q": None, "r": None}, {"q": "", "r": "d"}]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, {"q": "end", "r": "."}])
    assert read_back(f"{path}#q+r") == "a\nb|c|d|end\n.|"


def test_a_chat_goes_through_the_template(tmp_path, monkeypatch):
    chat = [{"role": "user", "content": "hi"}, {"role": "bot", "content": "ho"}]
    path = write_rows(tmp_path / "chat.jsonl", [{"messages": chat}])
    assert read_back(f"{path}#messages") == "<user>hi<bot>ho|"
    monkeypatch.setattr(Letters, "chat_template", None)
    with pytest.raises(UserError, match=r"line 1: field 'messages' is a chat, .* no chat template"):
        read_back(f"{path}#messages")


def test_folders_and_globs_hold_all_files_of_known_kinds(tmp_path):
    (tmp_path / "below" / ".hidden").mkdir(parents=True)
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one"))
    (tmp_path / "README.md").write_text("no")
    (tmp_path / "below" / ".hidden" / "c.txt").write_text("no")
    write_rows(tmp_path / "below" / "d.jsonl", [{"text": "row"}])
    assert read_back(str(tmp_path)) == "one\ntwo|row|"
    assert read_back(f"{tmp_path}/*.txt*") == "one\ntw"
    with pytest.raises(UserError, match=r"holds no file that ends with one of \.txt"):
        read_back(f"{tmp_path}/*.md")


def test_text_files_become_the_windows_that_measuring_reads(tmp_path, bundled_tokenizer):
    (tmp_path / "a.txt").write_text("It was a dark and stormy night.\r\n\n Rain fell.\n" * 30)
    (tmp_path / "b.txt").write_bytes("caf\u00e9\n".encode() * 40)
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    wanted = read_windows(paths, bundled_tokenizer, 16)
    stream = open_windows([str(path) for path in paths], bundled_tokenizer, 16, 0)
    found = stream.take(len(wanted))
    assert found.dtype == np.int64 and stream.num_windows == len(wanted)
    assert sorted(found.tolist()) == sorted(wanted.tolist())


def test_the_tokens_of_lines_do_not_depend_on_the_pieces(monkeypatch, bundled_tokenizer):
    monkeypatch.setattr(encoding, "PIECE", 100)
    monkeypatch.setattr(encoding, "BATCH", 200)
    text = "\n".join(f"Line {n}: he said, 'no' " + "x" * (n % 9) + "." for n in range(200))
    pieces = list(cut([text]))
    assert len(pieces) > 60
    chunks = list(token_chunks(((piece, False) for piece in pieces), bundled_tokenizer))
    assert len(chunks) > 20 and chunks[0].dtype == np.uint16
    whole = bundled_tokenizer(text, add_special_tokens=False).input_ids
    assert np.concatenate(chunks).tolist() == whole


@given(st.lists(st.text(alphabet=["a", "\u00e9", " ", "\n", "\t"], max_size=40)))
def test_cutting_loses_nothing(chunks: list[str]):
    before, encoding.PIECE = encoding.PIECE, 8
    try:
        pieces = list(cut(chunks))
    finally:
        encoding.PIECE = before
    assert "".join(pieces) == "".join(chunks)
    assert all(0 < len(piece) <= 8 for piece in pieces)


def test_a_long_row_is_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "PIECE", 8)
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "many words in a row " * 5}, {"text": "xy"}])
    assert read_back(str(path)) == "many words in a row " * 5 + "|xy|"


def test_what_ends_a_document(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "ab"}, {"text": "cd"}])
    monkeypatch.setattr(Letters, "eos_token_id", None)
    assert read_back(str(path)) == "ab\x01cd\x01"
    monkeypatch.setattr(Letters, "bos_token_id", None)
    with pytest.raises(UserError, match="no end- or beginning-of-sequence token"):
        read_back(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "no text in"),
        ("short.txt", b"x", "fewer .*than one window of"),
        ("latin.txt", b"caf\xe9", "latin.txt is not UTF-8 text: "),
        ("bad.txt.gz", b"not gzip", "not UTF-8 text in gzip"),
        ("cut.txt.gz", gzip.compress(b"word " * 1000)[:-20], "not UTF-8 text in gzip"),
        ("notes.md", b"text", "no known kind; it must end with one of .txt, .txt.gz, .jsonl"),
        ("bad.jsonl", b'{"text": "a"}\n\n{"text": \n', "bad.jsonl, line 3: not JSON"),
        ("latin.jsonl", b'{"text": "\xe9"}\n', "latin.jsonl, line 1: not JSON"),
        ("list.jsonl", b"[1]\n", "line 1: expected an object with fields, found a list"),
        ("number.jsonl", b'{"text": 3}\n', "line 1: field 'text' is a number, not text"),
        ("half.jsonl", b'{"text": "\\ud800"}\n', "not text that UTF-8 can express"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999)[:-9], "cut.jsonl.gz is damaged gzip"),
        ("one.json", b'{"text": "a"}', "expected a list of rows, found an object"),
        (
            "lines.json",
            b'{"text": "a"}\n{"text": "b"}',
            "lines.json .rows in lines of their own are .jsonl.: not JSON",
        ),
        ("bad.parquet", b"PAR1 not really", "bad.parquet is damaged"),
        ("field.jsonl", b'{"body": "a", "id": 1}\n', "no field 'text'; there are body, id: name one"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_text_is_refused(tmp_path, name: str, content: bytes, message: str, stream: bool):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        open_windows([str(tmp_path / name)], Letters(), 3, 0, stream=stream).take(1)
    assert "\n" not in str(refused.value)


def test_what_is_not_there_is_refused(tmp_path):
    for name in ("missing.txt", "nothing/*.txt", "a.txt=half"):
        with pytest.raises(UserError, match="there is no text file"):
            read_back(str(tmp_path / name))
    with pytest.raises(UserError, match="no text to train on"):
        open_windows([], Letters(), 3, 0)


def test_weights_are_for_all_sources_or_none(tmp_path):
    (tmp_path / "a.txt").write_text("aaaa")
    name, own = str(tmp_path / "a.txt"), np.full((2, 3), 7)
    for sources, options in ([f"{name}=1", name], {}), ([name], {"own": own}), ([f"{name}=1"], {"own": own}):
        with pytest.raises(UserError, match="some sources have a weight and some have none"):
            open_windows(sources, Letters(), 3, 0, **options)  # type: ignore[arg-type]
    mixed = open_windows([f"{name}=1"], Letters(), 3, 0, own=own, own_weight=3.0)
    assert mixed.weights == (1.0, 3.0)
    assert {tuple(window) for window in mixed.take(20).tolist()} == {(1, 97, 97), (7, 7, 7)}
    assert (open_windows([], Letters(), 3, 0, own=own).take(3) == 7).all()
    with pytest.raises(UserError, match=r"windows of 4 tokens, found \[2, 3\]"):
        open_windows([], Letters(), 4, 0, own=own)


def test_large_files_are_streamed(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl.gz", ROWS)
    monkeypatch.setattr(data, "STREAM_ABOVE", 3 * path.stat().st_size - 1)
    assert isinstance(open_windows([str(path)], Letters(), 3, 0).sources[0], StreamedWindows)
    assert not isinstance(
        open_windows([str(path)], Letters(), 3, 0, stream=False).sources[0], StreamedWindows
    )
    monkeypatch.setattr(data, "STREAM_ABOVE", 3 * path.stat().st_size)
    assert not isinstance(open_windows([str(path)], Letters(), 3, 0).sources[0], StreamedWindows)


def test_progress_is_told_in_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "PIECE", 8)
    (tmp_path / "a.txt").write_text("four words of text")
    seen = []
    open_windows([str(tmp_path / "a.txt")], Letters(), 3, 0, progress=lambda *told: seen.append(told))
    assert seen[0] == (0, 18) and seen[-1] == (18, 18) and len(seen) > 3 and seen == sorted(seen)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> list[tuple]:
    """Let the hub be a folder of two parquet files; return what was asked of it."""
    import datasets

    for number in range(2):
        write_rows(tmp_path / f"train-{number}.parquet", ROWS[number::2])
    real, asked = datasets.load_dataset, []

    def load_dataset(name: str, config: str | None, *, split: str, revision: str, streaming: bool):
        asked.append((name, config, split, revision))
        if split == "absent":
            raise ValueError("Bad split: absent.\nAvailable: train")
        return real(str(tmp_path), split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    monkeypatch.setattr(texts, "_commit", lambda name, revision: f"commit of {revision or 'now'}")
    return asked


def test_a_data_set_on_the_hub_is_streamed(hub: list[tuple]):
    stream = open_windows(["hub:owner/name"], Letters(), 9, 0)
    assert hub == [("owner/name", None, "train", "commit of now")]
    first = stream.take(60)
    again = open_windows(["hub:owner/name@main::train#text"], Letters(), 9, 0)
    assert np.array_equal(again.take(60), first) and np.array_equal(again.skip(50).take(10), first[50:])
    assert not np.array_equal(open_windows(["hub:owner/name"], Letters(), 9, 1).take(60), first)
    assert stream.num_windows is None
    assert stream.about()["sources"][0]["revision"] == "commit of now"
    assert stream.about() != again.about()
    stored = open_windows(["hub:owner/name:some:train"], Letters(), 9, 0, stream=False)
    assert stored.num_windows == sum(len(row["text"]) + 1 for row in ROWS) // 8
    assert hub[-1] == ("owner/name", "some", "train", "commit of now")


def test_what_the_hub_refuses_is_said(hub: list[tuple], tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match=r"hub:owner/name:absent can't be opened: Bad split: absent. Available"
    ):
        open_windows(["hub:owner/name::absent"], Letters(), 9, 0)
    with pytest.raises(UserError, match="hub:owner/name:train, row 1: there is no field 'body'"):
        open_windows(["hub:owner/name#body"], Letters(), 9, 0)
    with pytest.raises(UserError, match="expected hub:owner/name"):
        open_windows(["hub:owner/name:a:b:c"], Letters(), 9, 0)
    (tmp_path / "a.txt").write_text("aaaa")
    with pytest.raises(UserError, match="how much text hub:owner/name:train has is not known"):
        open_windows(["hub:owner/name", str(tmp_path / "a.txt")], Letters(), 9, 0)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="need the package datasets"):
        open_windows(["hub:owner/name"], Letters(), 9, 0)
    assert read_back(str(tmp_path / "a.txt"), f"{tmp_path}/a.txt") == "aaaa\naaa"
