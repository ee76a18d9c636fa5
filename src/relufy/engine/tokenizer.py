"""The tokenizer of a packed model: text to ids and back, streaming, without transformers."""

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from relufy.engine.packed_file import Header
from relufy.errors import UserError


class ModelTokenizer:
    """What the checkpoint's tokenizer.json and generation settings say."""

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
        settings = _settings(header)
        self.eos_ids = frozenset(_as_list(settings.get("eos_token_id", config.get("eos_token_id"))))

    def encode(self, text: str) -> list[int]:
        """Return the ids, with the special tokens that the model's texts begin with."""
        try:
            return self._tokenizer.encode(text).ids
        except (TypeError, UnicodeEncodeError):
            raise UserError("the prompt is not text that UTF-8 can express") from None

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def stream(self, prompt_ids: Sequence[int]) -> "TextStream":
        """Return a decoder of what follows the prompt; a space between the two is part of what follows."""
        stream = TextStream(self._tokenizer)
        for token in prompt_ids:
            stream.push(token)
        return stream


class TextStream:
    """Turns tokens into text as they come; characters that span tokens are given when they are whole."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        return self._stream.step(self._tokenizer, token) or ""


def _settings(header: Header) -> dict[str, Any]:
    try:
        settings = json.loads(header.blob("generation_config.json") or b"{}")
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise UserError(
            f"{header.path}: its generation_config.json is damaged; mend the checkpoint, pack again"
        )
    return settings


def _as_list(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
