"""A text's tokens in the engine's sequence: prompt, then what is chosen, and what happens when it is full.

Sliding keeps the first `keep` tokens (which models lean on as attention sinks) and the newest half of the
room that is left, as a fresh sequence: what follows is exactly what the model says to those tokens alone.
(Moving the old keys and values instead would be cheaper, and no model was trained on what it gives.)
"""

from collections.abc import Iterator
from dataclasses import replace

from relufy.engine.cpu import CpuEngine
from relufy.engine.generation_stats import Clock, Phase
from relufy.engine.request import Request
from relufy.engine.sampling import Chosen, Sampling
from relufy.engine.speculator import Speculator
from relufy.errors import UserError

RUN_SECONDS = 0.05
"""Tokens are decoded in runs that take so long, without coming back to Python for each."""
PREFILL_SECONDS = 0.5
"""About how long a part of a prompt takes, after which a text can be stopped."""
FIRST_PART = 128

_GOLDEN = 0x9E3779B97F4A7C15


class Window:
    """The sequence of one request. Raises UserError if the prompt does not fit and must not be cut."""

    def __init__(
        self, engine: CpuEngine, request: Request, clock: Clock, speculator: Speculator | None = None
    ):
        self._engine, self._request, self._clock = engine, request, clock
        self._speculator = speculator
        self._ids = _fitted(request, engine.context)
        self._num_prompt = len(self._ids)
        self._num_chosen = 0
        self.num_slides = 0
        self.num_dropped = len(request.prompt_ids) - len(self._ids)
        self.num_reused = 0
        self._sequence: int | None = None

    @property
    def num_seen(self) -> int:
        """The tokens of the text that the model still sees, the last chosen one included."""
        return len(self._ids)

    def runs(self) -> Iterator[list[Chosen]]:
        """Yield the chosen tokens in runs, until the context is full or, if it slides, for ever.

        An empty run comes after each part of a long prompt.
        """
        yield from self._begin("prefill")
        while True:
            if len(self._ids) <= self._engine.context:
                yield self._decode()
            elif self._request.context_policy == "sliding":
                self._slide()
                yield from self._begin("slide")
            else:
                return

    def close(self) -> None:
        """Give the sequence's place in the KV cache back, and the draft's."""
        self._end()
        if self._speculator:
            self._speculator.close()

    def _end(self) -> None:
        if self._sequence is not None:
            self._engine.free(self._sequence)
            self._sequence = None

    def _begin(self, phase: Phase) -> Iterator[list[Chosen]]:
        """Fill a fresh sequence with all tokens, choose the next."""
        request = self._request
        reuse = request.speculation.keeps if request.speculation else request.reuse
        if request.predictor:
            self._sequence = self._engine.new_predicted_sequence(self._num_prompt, len(self._ids))
        else:
            self._sequence = self._engine.new_sequence(self._num_prompt, reuse, len(self._ids))
        done = self._clock.time(phase, lambda: self._engine.reuse_prefix(self._sequence_id(), self._ids))
        self.num_reused += done if phase == "prefill" else 0
        part = FIRST_PART
        while len(self._ids) - done > part:
            before = self._clock.seconds[phase]
            self._step(phase, self._ids[done : done + part])
            done += part
            part = _next_part(part, self._clock.seconds[phase] - before)
            yield []
        yield self._choose(phase, self._ids[done:], 1)

    def _decode(self) -> list[Chosen]:
        room = self._engine.context - len(self._ids) + 1
        if self._request.max_new_tokens is not None:
            room = min(room, self._request.max_new_tokens - self._num_chosen)
        count = max(1, min(room, self._clock.tokens_within(RUN_SECONDS)))
        chosen = self._choose("decode", self._ids[-1:], count, room)
        self._clock.num_chosen += len(chosen)
        return chosen

    def _choose(self, phase: Phase, tokens: list[int], count: int, most: int = 0) -> list[Chosen]:
        """Choose `count` tokens; while decoding, a speculation's last round may choose up to `most`."""
        request, sampling, speculator = self._request, self._sampling(), self._speculator
        how = tuple(request.ends), sampling, request.logprobs or 0
        sequence = self._sequence_id()

        def choose() -> list[Chosen]:
            if speculator and phase == "decode":
                return speculator.decode(sequence, tokens, count, most, *how)
            chosen = self._engine.decode(sequence, tokens, count, *how)
            if speculator:
                speculator.read(sequence, chosen[-1].token)
            return chosen

        chosen = self._clock.time(phase, choose)
        self._ids += [choice.token for choice in chosen]
        self._num_chosen += len(chosen)
        return chosen

    def _step(self, phase: Phase, tokens: list[int]) -> None:
        self._clock.time(phase, lambda: self._engine.step([(self._sequence_id(), tokens)], "none"))

    def _slide(self) -> None:
        self._end()
        keep = self._request.keep
        newest = len(self._ids) - _half(self._engine.context, keep)
        self._num_prompt = min(self._num_prompt, keep) + max(0, self._num_prompt - newest)
        self._ids = self._ids[:keep] + self._ids[newest:]
        self.num_slides += 1

    def _sampling(self) -> Sampling:
        """Return the request's sampling, with another seed after a slide: positions, which random numbers
        are drawn from, come again."""
        seed = (self._request.sampling.seed + self.num_slides * _GOLDEN) % (1 << 64)
        return replace(self._request.sampling, seed=seed) if self.num_slides else self._request.sampling

    def _sequence_id(self) -> int:
        assert self._sequence is not None
        return self._sequence


def _fitted(request: Request, context: int) -> list[int]:
    """Return the prompt, or, where the request slides, what of a longer one leaves room for the text."""
    ids = list(request.prompt_ids)
    slides = request.context_policy == "sliding"
    if slides and request.keep > context - 2:
        raise UserError(f"keep is {request.keep} tokens, too many for a context of {context}")
    if len(ids) <= context:
        return ids
    if not slides:
        raise UserError(
            f"the prompt has {len(ids)} tokens, more than the context of {context}; shorten it, or choose "
            "the context policy sliding, which reads its newest part"
        )
    half = _half(context, request.keep)
    room = half if request.max_new_tokens is None else min(half, request.max_new_tokens)
    return ids[: request.keep] + ids[len(ids) - (context - request.keep - room) :]


def _half(context: int, keep: int) -> int:
    """Return how many of the newest tokens a slide keeps."""
    return (context - keep) // 2


def _next_part(part: int, seconds: float) -> int:
    """Return the size of the next part of a prompt, from what the last one took; never much less or more."""
    wanted = int(part * PREFILL_SECONDS / seconds) if seconds else 2 * part
    return max(FIRST_PART, min(wanted, 2 * part)) // FIRST_PART * FIRST_PART
