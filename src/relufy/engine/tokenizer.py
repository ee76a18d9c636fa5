"""The tokenizer of a packed model: text to ids and back, without transformers."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from relufy.engine.packed_file import Header
from relufy.engine.text_stream import TextStream
from relufy.errors import UserError

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Hugging Face's names for the tokens that a chat template may ask for."""


class ModelTokenizer:
    """What the checkpoint's tokenizer.json, tokenizer_config.json and generation_config.json say.

    `eos_ids` end a text. `generation_settings` is generation_config.json as it is.
    """

    def __init__(self, header: Header):
        raw = header.blob("tokenizer.json")
        if raw is None:
            raise UserError(f"{header.path} holds no tokenizer.json, so it can't read or write text")
        try:
            self._tokenizer = Tokenizer.from_str(raw.decode())
        except Exception as error:  # the tokenizers package raises plain Exceptions
            raise UserError(f"{header.path}: its tokenizer.json can't be read: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = header.metadata().get("config", {})
        self.generation_settings = json_blob(header, "generation_config.json")
        ends = self.generation_settings.get("eos_token_id", config.get("eos_token_id"))
        self.eos_ids = frozenset(_as_list(ends))
        self._beginning = _as_list(config.get("bos_token_id"))
        self._named = json_blob(header, "tokenizer_config.json")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids, with the special tokens that the model's texts begin with unless told not to."""
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError):
            raise UserError("the prompt is not text that UTF-8 can express") from None

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def piece(self, token: int) -> str:
        """Return a token as the vocabulary writes it; empty for an id that the tokenizer does not use."""
        return self._tokenizer.id_to_token(token) or ""

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Return ids without special tokens, and at which character of the text each token ends."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, [end for _, end in encoding.offsets]

    def named_id(self, name: str) -> int | None:
        """Return the id of the special token that tokenizer_config.json names so ("bos_token"), or None."""
        return self._tokenizer.token_to_id(_content(self._named.get(name)))

    def vocabulary(self) -> dict[int, str]:
        """Return every token as the vocabulary writes it, by its id."""
        return {token: text for text, token in self._tokenizer.get_vocab(with_added_tokens=True).items()}

    def special_tokens(self) -> dict[str, str]:
        """Return the texts of the special tokens by Hugging Face's names, of those that the model has."""
        found = {name: _content(self._named.get(name)) for name in SPECIAL_TOKENS}
        if not found["bos_token"] and self._beginning:
            found["bos_token"] = self.piece(self._beginning[0])
        if not found["eos_token"] and self.eos_ids:
            found["eos_token"] = self.piece(min(self.eos_ids))
        return {name: text for name, text in found.items() if text}

    def turn_ends(self) -> frozenset[int]:
        """Return the tokens that end an answer of a chat: those that end a text, and the tokenizer's own."""
        named = self.named_id("eos_token")
        return self.eos_ids if named is None else self.eos_ids | {named}

    def stream(self, prompt_ids: Sequence[int]) -> TextStream:
        """Return a decoder of what follows the prompt; a space between the two is part of what follows."""
        return TextStream(self.decode, prompt_ids)


def json_blob(header: Header, name: str) -> dict[str, Any]:
    """Return a JSON object that the packed file carries, empty if it is not there. Raises UserError."""
    try:
        content = json.loads(header.blob(name) or b"{}")
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{header.path}: its {name} is damaged; mend the checkpoint, pack again")
    return content


def _content(token: Any) -> str:
    """Return the text of a token, which is written plainly or as {"content": ...}."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else ""


def _as_list(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
