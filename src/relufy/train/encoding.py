"""Long texts to token ids in bounded memory: cut into pieces, encoded in batches, kept in few bytes.

A piece ends with a line. Where a line follows directly on another (no blank between them), byte-level
tokenizers give the same tokens as for the whole text; at other borders, and with tokenizers that put a space
before each text (sentencepiece), the tokens beside a border may differ.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from relufy.errors import UserError

PIECE = 1 << 16
"""Characters in a piece at most."""
BATCH = 1 << 20
"""Characters that the tokenizer gets at once, in pieces, so that it uses all cores."""

Piece = tuple[str, bool]
"""A part of a text, and whether a document ends with it."""

_BORDERS = tuple(map(re.compile, (r"(?<=\S)\n(?=\S)", r"\n(?=\S)", r"\n", r"(?<=\S)(?= )")))


def cut(chunks: Iterable[str]) -> Iterator[str]:
    """Yield the text that the chunks make up in pieces of at most PIECE characters, none of them empty."""
    waiting = ""
    for chunk in chunks:
        waiting += chunk
        while len(waiting) > PIECE:
            at = _border(waiting)
            yield waiting[:at]
            waiting = waiting[at:]
    if waiting:
        yield waiting


def document_pieces(text: str) -> Iterator[Piece]:
    """Yield the pieces of one document; an empty one has none."""
    pieces = list(cut(text[at : at + PIECE] for at in range(0, len(text), PIECE)))
    for number, piece in enumerate(pieces, start=1):
        yield piece, number == len(pieces)


def token_chunks(pieces: Iterable[Piece], tokenizer: Any) -> Iterator[np.ndarray]:
    """Yield the tokens of the pieces in order, `[tokens]`, uint16 where the vocabulary permits, else uint32.

    No special tokens, but one after each document: the end-of-sequence token, or the beginning-of-sequence
    token of a tokenizer that has no other. Raises UserError if documents end and there is neither.
    """
    dtype = np.uint16 if highest_token(tokenizer) < 1 << 16 else np.uint32
    for batch in _batches(pieces):
        texts = [text for text, _ in batch]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        ids: list[int] = []
        for tokens, (_, is_end) in zip(encoded, batch, strict=True):
            ids += tokens
            if is_end:
                ids.append(separator(tokenizer))
        yield np.array(ids, dtype=dtype)


def separator(tokenizer: Any) -> int:
    """Return the token that ends a document among others."""
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token is not None:
            return token
    raise UserError(
        "the tokenizer has no end- or beginning-of-sequence token to put between rows; give plain text files"
    )


def highest_token(tokenizer: Any) -> int:
    """Return the greatest id of a vocabulary, added tokens included."""
    return max(tokenizer.get_vocab().values())


def _border(text: str) -> int:
    """Return where to cut a text longer than PIECE: after a line if there is one, else before a space."""
    for pattern in _BORDERS:
        ends = [match.end() for match in pattern.finditer(text, PIECE // 2, PIECE + 1)]
        if ends and ends[-1] <= PIECE:
            return ends[-1]
    return PIECE


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
