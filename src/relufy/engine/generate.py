"""A text in the making: the loop from chosen tokens to streamed text, and when it ends.

request.py says what is asked for, window.py runs the engine, text_stream.py turns tokens into text.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from relufy.engine.cpu import CpuEngine
from relufy.engine.generation_stats import Clock, FinishReason, GenerationStats
from relufy.engine.request import Request
from relufy.engine.sampling import Chosen
from relufy.engine.speculator import Speculator
from relufy.engine.text_stream import StoppableText
from relufy.engine.tokenizer import ModelTokenizer
from relufy.engine.window import Window


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token, its logarithmic probability, and those of the likeliest tokens: (token, logprob) pairs.

    The probabilities are the model's own, before penalties, bias and temperature.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass
class _Written:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    is_told_to_stop: bool = False


class Generation:
    """A text in the making: iterate over it for its pieces, or `run` it; then see `text` and `stats`.

    `text` leaves out the stop text and the token that ends a text; `token_ids` leaves out the latter.
    Dropping it half-way frees its place in the KV cache.
    """

    def __init__(
        self,
        engine: CpuEngine,
        tokenizer: ModelTokenizer,
        request: Request,
        speculator: Speculator | None = None,
    ):
        self.request = request
        self._clock = Clock(engine)
        self._speculator = speculator
        self._window = Window(engine, request, self._clock, speculator)
        self._written = _Written()
        self._pieces = _write(self._window, tokenizer, request, self._written)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def run(self) -> "Generation":
        """Write to the end and return self."""
        for _ in self:
            pass
        return self

    def stop(self) -> None:
        """End the text soon: its iteration ends before the next run of tokens. Callable from anywhere."""
        self._written.is_told_to_stop = True

    @property
    def text(self) -> str:
        """What has been written so far, without the prompt: the pieces, joined."""
        return self._written.text

    @property
    def token_ids(self) -> list[int]:
        return self._written.token_ids

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """One for each of `token_ids`, if the request asked for them, else none."""
        return self._written.logprobs

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it has not."""
        return self._written.finish_reason

    @property
    def stats(self) -> GenerationStats:
        """What the generation did so far."""
        clock, window = self._clock, self._window
        speculation = self._speculator.stats() if self._speculator else None
        return GenerationStats(
            prompt_tokens=len(self.request.prompt_ids),
            new_tokens=len(self.token_ids),
            prefill_seconds=clock.seconds["prefill"],
            decode_seconds=clock.seconds["decode"],
            weight_bytes_per_token=speculation.weight_bytes_per_token
            if speculation
            else clock.per_token("weight_bytes"),
            kv_bytes_per_token=speculation.kv_bytes_per_token if speculation else clock.per_token("kv_bytes"),
            sparsity=speculation.sparsity if speculation else clock.sparsity(),
            finish_reason=self.finish_reason,
            reused_tokens=window.num_reused,
            dropped_tokens=window.num_dropped,
            context_used=window.num_seen,
            num_slides=window.num_slides,
            slide_seconds=clock.seconds["slide"],
            reuse=clock.reuse() if self.request.reuse else None,
            speculation=speculation,
            prediction=clock.prediction() if self.request.predictor else None,
        )


def _write(window: Window, tokenizer: ModelTokenizer, request: Request, written: _Written) -> Iterator[str]:
    """Yield text as it becomes certain."""
    text = StoppableText(tokenizer.stream(request.prompt_ids), request.stop)
    try:
        for chosen in _chosen(window, written):
            written.finish_reason = _take(chosen, text, request, written)
            piece = text.finish() if written.finish_reason else text.take()
            written.text += piece
            if piece:
                yield piece
            if written.finish_reason:
                return
        written.finish_reason = "stopped" if written.is_told_to_stop else "context"
        piece = text.finish()
        written.text += piece
        if piece:
            yield piece
    finally:
        written.finish_reason = written.finish_reason or "stopped"
        window.close()


def _chosen(window: Window, written: _Written) -> Iterator[Chosen]:
    """Yield chosen tokens until the context is full, or it is told to stop."""
    for run in window.runs():
        yield from run
        if written.is_told_to_stop:
            return


def _take(chosen: Chosen, text: StoppableText, request: Request, written: _Written) -> FinishReason | None:
    """Add a token to the text; return why the text ends with it, if it does."""
    if chosen.token in request.ends:
        return "end"
    written.token_ids.append(chosen.token)
    if request.logprobs is not None:
        written.logprobs.append(TokenLogprob(*chosen))
    if text.push(chosen.token):
        return "stop"
    return "length" if len(written.token_ids) == request.max_new_tokens else None
