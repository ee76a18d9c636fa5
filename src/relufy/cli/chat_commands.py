"""What a line of a chat means: something said, or a /command. Knows no terminal.

A line becomes a `Reply`: an answer to iterate over, a note beside the conversation, or the end.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from relufy.engine.conversation import Conversation
from relufy.engine.generation_stats import GenerationStats
from relufy.engine.request import IGNORED, GenerationOptions, ignored_options, make_request
from relufy.errors import UserError
from relufy.files import replacing
from relufy.schema import suggest

SAVED = "relufy chat"
SETTINGS: dict[str, Callable[[str], Any]] = {
    "max_new_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
    "stop": str,
    "context_policy": str,
    "keep": int,
}
"""What /set changes, and how a value is read."""

COMMANDS = {
    "help": ("", "show these commands"),
    "new": ("", "begin anew; the system message stays"),
    "system": ("TEXT", "put a system message first; without TEXT, remove it"),
    "undo": ("", "take back what you said last, and its answer"),
    "retry": ("", "answer again, with other random numbers"),
    "save": ("FILE", "write the conversation to a file"),
    "load": ("FILE", "go on with a saved conversation"),
    "set": ("KEY VALUE", "change a setting; without VALUE, back; without KEY, show all"),
    "stats": ("", "show what the last answer took"),
    "exit": ("", "leave; so does Ctrl-D"),
}
"""Each command's argument and what it does."""


@dataclass(frozen=True)
class Reply:
    """What a line leads to."""

    note: str = ""
    answer: Iterator[str] | None = None
    is_end: bool = False


class ChatCommands:
    """Takes a conversation's lines. User errors become notes, and nothing has changed then."""

    def __init__(self, conversation: Conversation):
        self.conversation = conversation
        self._begun = {"max_new_tokens": conversation.max_new_tokens, **conversation.options}

    def take(self, line: str) -> Reply:
        """Return what a line leads to; an empty one leads to nothing."""
        text = line.strip()
        try:
            if text.startswith("/"):
                return self._command(text[1:])
            return Reply(answer=self.conversation.ask(text)) if text else Reply()
        except (UserError, OSError) as error:
            return Reply(note=str(error))

    def _command(self, text: str) -> Reply:
        word, _, argument = text.partition(" ")
        if word not in COMMANDS:
            raise UserError(f"there is no command /{word}{suggest(word, list(COMMANDS))}; /help shows them")
        takes, _ = COMMANDS[word]
        if argument and not takes:
            raise UserError(f"/{word} takes nothing after it")
        found = getattr(self, f"_{word}")(*([argument.strip()] if takes else []))
        return found if isinstance(found, Reply) else Reply(note=found)

    def _help(self) -> str:
        rows = [(f"/{word} {takes}".rstrip(), does) for word, (takes, does) in COMMANDS.items()]
        width = max(len(usage) for usage, _ in rows)
        return "\n".join(f"{usage:<{width}}  {does}" for usage, does in rows)

    def _new(self) -> str:
        self.conversation.clear()
        return "a new conversation"

    def _system(self, text: str) -> str:
        self.conversation.set_system(text)
        return "the system message is set" if text else "no system message"

    def _undo(self) -> str:
        return f"taken back: {self.conversation.undo()}"

    def _retry(self) -> Reply:
        is_greedy = not self.conversation.options.get("temperature")
        note = "temperature is 0, so the answer stays the same; /set temperature 0.8" if is_greedy else ""
        return Reply(note, answer=self.conversation.retry())

    def _save(self, name: str) -> str:
        path = _named_file(name, "save")
        if path.exists():
            _read(path)  # only a conversation is replaced
        content = {SAVED: 1, "messages": self.conversation.messages}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return f"saved {len(self.conversation.messages)} messages to {path}"

    def _load(self, name: str) -> str:
        messages = _read(_named_file(name, "load"))
        self.conversation.load(messages)
        return f"{len(messages)} messages loaded"

    def _set(self, argument: str) -> str:
        if not argument:
            return "\n".join(f"{name} {_shown(self._value(name))}" for name in SETTINGS)
        key, _, value = argument.partition(" ")
        if key not in SETTINGS:
            raise UserError(f"there is no setting {key}{suggest(key, list(SETTINGS))}")
        self._change(key, value.strip())
        is_ignored = key in ignored_options(self.conversation.options)
        return f"{key} is {_shown(self._value(key))}{'; ' + IGNORED[key] if is_ignored else ''}"

    def _value(self, key: str) -> Any:
        if key == "max_new_tokens":
            return self.conversation.max_new_tokens
        return self.conversation.options.get(key)

    def _change(self, key: str, value: str) -> None:
        """Set an option; without a value, to what the chat began with. Raises UserError, and then it is as it
        was."""
        conversation = self.conversation
        try:
            read = SETTINGS[key](value) if value else self._begun.get(key)
        except ValueError:
            kind = "a whole number" if SETTINGS[key] is int else "a number"
            raise UserError(f"{key} must be {kind}, found {value!r}") from None
        most = read if key == "max_new_tokens" else conversation.max_new_tokens
        options = dict(conversation.options) | ({} if key == "max_new_tokens" else {key: read})
        make_request((0,), most, options)
        conversation.max_new_tokens, conversation.options = most, cast(GenerationOptions, options)

    def _stats(self) -> str:
        if self.conversation.last is None:
            raise UserError("nothing has been answered yet")
        return stats_text(self.conversation.last.stats, self.conversation)

    def _exit(self) -> Reply:
        return Reply(is_end=True)


def live_line(stats: GenerationStats, context: int) -> str:
    """Return an answer's state in one line: tokens, tokens/s, sparsity by site, and the context used."""
    sites = ", ".join(f"{site} {share:.0%}" for site, share in stats.mean_sparsity().items())
    rate = f"{stats.decode_tokens_per_second:.1f} tokens/s, " if stats.decode_seconds else ""
    sparsity = f"sparsity {sites}, " if sites else ""
    return f"{stats.new_tokens} tokens, {rate}{sparsity}context {stats.context_used}/{context}"


def stats_text(stats: GenerationStats, conversation: Conversation) -> str:
    """Return what an answer took, in a few lines."""
    lines = [
        live_line(stats, conversation.engine.context),
        f"prompt {stats.prompt_tokens} tokens, {stats.reused_tokens} of them from the cache, the others in "
        f"{stats.prefill_seconds:.2f} s ({stats.prefill_tokens_per_second:.0f} tokens/s)",
        f"{stats.weight_bytes_per_token / 1e6:.2f} MB of weights a token, {stats.gb_per_second:.1f} GB/s; "
        f"ended by {stats.finish_reason}",
    ]
    if stats.speculation:
        lines.append(stats.speculation.summary())
    if stats.num_slides or stats.dropped_tokens:
        lines.append(
            f"the context slid {stats.num_slides} times; {stats.dropped_tokens} of the prompt's tokens did "
            "not fit"
        )
    if conversation.num_forgotten:
        lines.append(f"the model no longer sees the oldest {conversation.num_forgotten} messages")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return "default" if value is None else str(value)


def _named_file(name: str, command: str) -> Path:
    if not name:
        raise UserError(f"/{command} takes the name of a file")
    try:
        path = Path(name).expanduser()
    except RuntimeError:
        raise UserError(f"there is no home folder for {name}") from None
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file")
    return path


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the messages of a saved conversation. Raises UserError if the file is none."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        messages = content["messages"]
        if SAVED not in content or not isinstance(messages, list):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a conversation that /save wrote") from None
    return messages
