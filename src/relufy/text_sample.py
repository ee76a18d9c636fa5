"""A seeded sample of windows from texts of any length, in one pass and bounded memory; chats too.

Text is encoded in pieces that end with a line, so beside those borders tokens may differ from those of the
whole text. What `relufy measure` reads is cut by `text.TextWindows`, in longer pieces.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relufy.errors import UserError
from relufy.text import lines

PIECE = 1 << 18
"""Characters that are encoded at once."""


def sample_windows(
    paths: Sequence[Path | str], tokenizer: Any, length: int, count: int, seed: int = 0
) -> np.ndarray:
    """Return `count` windows of `length` tokens (fewer if the text has fewer), int64 `[windows, length]`.

    They are drawn from the whole text, in its order. Files are UTF-8 text, or `.jsonl` with a `text` or a
    chat in each line (`messages`, or `prompt` and `response`), which the tokenizer's chat template writes
    out; both also as `.gz`. A beginning-of-sequence token opens each window if the tokenizer has one. Raises
    UserError for files that are not so, and for a text shorter than one window.
    """
    generator = np.random.default_rng(seed)
    drawn: list[tuple[int, np.ndarray]] = []
    seen = 0
    for seen, window in enumerate(_windows(paths, tokenizer, length), start=1):
        if len(drawn) < count:
            drawn.append((seen, window))
        elif (place := int(generator.integers(seen))) < count:
            drawn[place] = (seen, window)
    if not seen:
        raise UserError(f"the text has fewer tokens than one window of {length}; give more text")
    return np.stack([window for _, window in sorted(drawn, key=lambda pair: pair[0])])


def text_pieces(paths: Sequence[Path | str], tokenizer: Any = None) -> Iterator[str]:
    """Yield the text of files as `sample_windows` reads them, in pieces of about PIECE characters.

    Without a tokenizer, files of chats are refused. Raises UserError.
    """
    for path in map(Path, paths):
        yield from _pieces(path, tokenizer)


def _windows(paths: Sequence[Path | str], tokenizer: Any, length: int) -> Iterator[np.ndarray]:
    bos = tokenizer.bos_token_id
    start = [] if bos is None else [bos]
    body = length - len(start)
    waiting: list[int] = []
    for path in map(Path, paths):
        for piece in _pieces(path, tokenizer):
            waiting += tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
            full = len(waiting) - len(waiting) % body
            for at in range(0, full, body):
                yield np.array(start + waiting[at : at + body], dtype=np.int64)
            waiting = waiting[full:]


def _pieces(path: Path, tokenizer: Any) -> Iterator[str]:
    """Yield a file's text in pieces of about PIECE characters that end with a line."""
    is_chat = path.suffixes[-2:] == [".jsonl", ".gz"] or path.suffix == ".jsonl"
    buffered = ""
    for line in _chat_texts(path, tokenizer) if is_chat else lines(path, PIECE):
        buffered += line
        if len(buffered) >= PIECE:
            yield buffered
            buffered = ""
    if buffered:
        yield buffered


def _chat_texts(path: Path, tokenizer: Any) -> Iterator[str]:
    for number, line in enumerate(_records(path), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from None
        yield _text_of(record, tokenizer, f"{path}, line {number}")


def _records(path: Path) -> Iterator[str]:
    record = ""
    for part in lines(path, PIECE):
        record += part
        if record.endswith("\n"):
            if record.strip():
                yield record
            record = ""
    if record.strip():
        yield record


def _text_of(record: Any, tokenizer: Any, where: str) -> str:
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return record["text"] + "\n"
    messages = _messages(record)
    if messages is None:
        raise UserError(f"{where}: expected 'text', 'messages', or 'prompt' and 'response'")
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{where} is a chat, and the tokenizer has no chat template; give plain text")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:
        raise UserError(
            f"{where}: the chat template refuses it: {' '.join(str(error).split())[:200]}"
        ) from error


def _messages(record: Any) -> list[dict[str, str]] | None:
    if not isinstance(record, dict):
        return None
    if isinstance(record.get("messages"), list):
        return record["messages"]
    if isinstance(record.get("prompt"), str) and isinstance(record.get("response"), str):
        roles = (("user", "prompt"), ("assistant", "response"))
        return [{"role": role, "content": record[key]} for role, key in roles]
    return None
