"""What to write: the options of a generation, checked, and the request that they make."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypedDict

from relufy.engine.reuse import Reuse, as_reuse
from relufy.engine.sampling import Sampling
from relufy.engine.speculation import Speculation, as_speculation
from relufy.errors import UserError
from relufy.schema import suggest

ContextPolicy = Literal["refuse", "sliding"]
CONTEXT_POLICIES: tuple[str, ...] = ("refuse", "sliding")
MAX_LOGPROBS = 100

_SAMPLING = tuple(entry.name for entry in fields(Sampling))

IGNORED = {
    **dict.fromkeys(("top_k", "top_p", "min_p", "seed"), "it needs a temperature above 0"),
    "keep": "it needs the context policy sliding",
}
"""Options that change nothing beside some others, and why."""


class GenerationOptions(TypedDict, total=False):
    """The options of `Engine.generate` and `Engine.chat`. None stands for the default.

    Choosing: `temperature` (0: the most likely token), `top_k` (0: all), `top_p`, `min_p`,
    `repetition_penalty`, `presence_penalty`, `frequency_penalty`, `logit_bias` (token id to what is added to
    its logit), `seed`. Ending: `stop`, one text or several. Telling: `logprobs`, how many of the most likely
    tokens to name beside each chosen one. A full context: `context_policy` "refuse" ends the text there, and
    refuses a longer prompt; "sliding" forgets all but the first `keep` tokens and the newest half of the
    others, computes those anew as a text of their own, and goes on. Speed: `speculation`, who proposes tokens
    that the model then verifies together (docs/decoding.md), and the text stays exact; `reuse`, by a period
    or by all its settings, lets most tokens compute only neurons that were active lately, which is not exact;
    `predictor`, that the file's predictor names those that later tokens compute, which is not exact either.
    """

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Sequence[str] | None
    logprobs: int | None
    context_policy: ContextPolicy | None
    keep: int | None
    reuse: Reuse | int | None
    speculation: Speculation | str | None
    predictor: bool | None


@dataclass(frozen=True)
class Request:
    """What to write: the prompt's tokens, how to choose the next ones, and when to stop.

    `max_new_tokens` None means until the model ends its text, or the context is full. `ends` are the tokens
    that end the text. `logprobs` None means that none are returned.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    ends: frozenset[int] = frozenset()
    logprobs: int | None = None
    context_policy: ContextPolicy = "refuse"
    keep: int = 4  # attention sinks: Xiao et al. 2023, Efficient Streaming Language Models, section 3.2
    reuse: Reuse | None = None
    speculation: Speculation | None = None
    predictor: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, found {self.max_new_tokens}")
        if not all(isinstance(stop, str) for stop in self.stop):
            raise UserError(f"stop must be a text or a list of texts, found {self.stop!r}")
        if "" in self.stop:
            raise UserError("a stop text is empty")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise UserError(f"logprobs must be at least 0 and at most {MAX_LOGPROBS}, found {self.logprobs}")
        if self.context_policy not in CONTEXT_POLICIES:
            known = list(CONTEXT_POLICIES)
            raise UserError(
                f"there is no context policy {self.context_policy!r}{suggest(self.context_policy, known)}"
            )
        if self.reuse and self.speculation:
            raise UserError("reuse is not exact, and speculation verifies exactly; choose one of the two")
        if self.predictor and (self.reuse or self.speculation):
            other = "reuse" if self.reuse else "speculation"
            raise UserError(f"a predictor and {other} decide on the same neurons; choose one of the two")
        if self.keep < 0:
            raise UserError(f"keep must be 0 or more tokens, found {self.keep}")
        if not self.prompt_ids:
            raise UserError("the prompt is empty, and this model has no token that begins a text")


def make_request(
    prompt_ids: Sequence[int],
    max_new_tokens: int | None,
    options: Mapping[str, Any],
    ends: frozenset[int] = frozenset(),
    more_stops: Sequence[str] = (),
) -> Request:
    """Make a request of `GenerationOptions`. Raises UserError; TypeError for a name that is no option."""
    unknown = set(options) - set(GenerationOptions.__annotations__)
    if unknown:
        raise TypeError(f"there is no option {min(unknown)!r} of a generation")
    given = {name: value for name, value in options.items() if value is not None}
    sampling = Sampling(**{name: given.pop(name) for name in _SAMPLING if name in given})
    if "reuse" in given:
        given["reuse"] = as_reuse(given["reuse"])
    if "speculation" in given:
        given["speculation"] = as_speculation(given["speculation"])
    stop = given.pop("stop", ())
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    return Request(tuple(prompt_ids), max_new_tokens, sampling, (*stops, *more_stops), ends=ends, **given)


def ignored_options(options: Mapping[str, Any]) -> list[str]:
    """Return those of `GenerationOptions` that are given but change nothing; IGNORED says why."""
    is_greedy, slides = not options.get("temperature"), options.get("context_policy") == "sliding"
    given = [name for name in IGNORED if options.get(name) is not None]
    return [name for name in given if (not slides if name == "keep" else is_greedy)]
