"""Rows of data files (jsonl, json, parquet), and the text that a row holds in its fields or in a chat."""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from relufy.errors import UserError

TEXT_KINDS = (".txt", ".txt.gz")
ROW_KINDS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
KINDS = TEXT_KINDS + ROW_KINDS
TEXT_FIELD = "text"

Row = Mapping[str, Any]


def kind_of(path: Path) -> str | None:
    """Return which of KINDS a file is by its name, or None."""
    return next((kind for kind in KINDS if path.name.lower().endswith(kind)), None)


def file_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield where each row stands (for errors), and the row. Raises UserError for damaged files."""
    kind = kind_of(path)
    assert kind in ROW_KINDS
    try:
        if kind == ".parquet":
            yield from _parquet_rows(path)
        elif kind.startswith(".jsonl"):
            yield from _jsonl_rows(path)
        else:
            yield from _json_rows(path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged gzip: {error}") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from None


def row_text(row: Row, field: str, where: str, tokenizer: Any) -> str:
    """Return the text in a row's field, or in several ("instruction+response") joined by newlines.

    A field is text, or a chat (messages with a role and content) that the tokenizer's template writes out;
    an empty one or null adds nothing. Raises UserError if a field is missing or is something else.
    """
    names = [field] if field in row else field.split("+")
    for name in names:
        if name not in row:
            raise UserError(
                f"{where}: there is no field {name!r}; there are {', '.join(map(str, row)) or 'none'}: "
                "name one or more behind the path, as in rows.jsonl#question+answer"
            )
    parts = [_field_text(row[name], f"{where}: field {name!r}", tokenizer) for name in names]
    return "\n".join(part for part in parts if part)


def open_bytes(path: Path) -> Any:
    """Open a file for reading bytes, unpacked if its name ends with .gz."""
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with open_bytes(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, _mapping(_json(line, where), where)


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with open_bytes(path) as stream:
        rows = _json(stream.read(), f"{path} (rows in lines of their own are .jsonl)")
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of rows, found {_kind_name(rows)}")
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        yield where, _mapping(row, where)


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"reading {path} needs pyarrow: pip install 'relufy[train]'") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except ArrowException as error:
        raise UserError(f"{path} is damaged after row {number}: {' '.join(str(error).split())}") from None


def _json(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:  # also bytes that are no UTF-8
        raise UserError(f"{where}: not JSON: {error}") from None


def _mapping(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with fields, found {_kind_name(row)}")
    return row


def _field_text(value: Any, where: str, tokenizer: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return _chat_text(value, where, tokenizer)
    if not isinstance(value, str):
        raise UserError(f"{where} is {_kind_name(value)}, not text or a list of messages")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} is not text that UTF-8 can express") from None
    return value


def _chat_text(messages: list[Any], where: str, tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{where} is a chat, and the tokenizer has no chat template; give plain text")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is a stranger's program
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: the chat template refuses it: {reason}") from error


def _kind_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
