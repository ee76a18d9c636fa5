"""What a generation did: tokens, seconds, bytes and sparsity, of the whole and of every moment of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from relufy.engine.cpu import CpuEngine
from relufy.engine.prediction import PredictionStats, prediction_stats
from relufy.engine.reuse import ReuseStats, reuse_stats
from relufy.engine.speculation import SpeculationStats

Result = TypeVar("Result")

Phase = Literal["prefill", "decode", "slide"]
"""Reading the prompt; writing; reading again what a full context keeps."""

FinishReason = Literal["length", "stop", "end", "context", "stopped"]
"""max_new_tokens reached; a stop text was written; the model ended its text; the context is full; it was
told to stop."""


@dataclass(frozen=True)
class GenerationStats:
    """What one generation did so far. Bytes are those of the decoded tokens, read from memory or cache.

    The engine counts bytes and sparsity of all that it runs: where several threads generate with one engine
    at once, each one's figures include the others' work. With `speculation`, bytes include the drafts', and
    `sparsity` is that of the tokens that were verified.

    `reused_tokens` of the prompt were still in the KV cache, `dropped_tokens` of it were left out because the
    context is too short. `sparsity` is the share of inputs or neurons skipped while decoding, for each site
    and layer. `context_used` counts the tokens that the model still sees. `finish_reason` is None until the
    end.
    """

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    weight_bytes_per_token: float
    kv_bytes_per_token: float
    sparsity: dict[str, list[float]]
    finish_reason: FinishReason | None
    reused_tokens: int = 0
    dropped_tokens: int = 0
    context_used: int = 0
    num_slides: int = 0
    slide_seconds: float = 0.0
    reuse: ReuseStats | None = None
    speculation: SpeculationStats | None = None
    prediction: PredictionStats | None = None

    @property
    def prefill_tokens_per_second(self) -> float:
        """Tokens of the prompt read per second, without those that were reused or dropped."""
        read = self.prompt_tokens - self.reused_tokens - self.dropped_tokens
        return read / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens per second after the first new one, which prefill gives, and without slides and theirs."""
        decoded = self.new_tokens - 1 - self.num_slides
        return max(0, decoded) / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def gb_per_second(self) -> float:
        """All bytes read while decoding, divided by the time that took."""
        bytes_per_token = self.weight_bytes_per_token + self.kv_bytes_per_token
        return bytes_per_token * self.decode_tokens_per_second / 1e9

    def mean_sparsity(self) -> dict[str, float]:
        """Return the mean over the layers for each site."""
        return {site: sum(shares) / len(shares) for site, shares in self.sparsity.items() if shares}


class Clock:
    """Times the engine's work by phase, and adds up the engine's counts of decoding."""

    def __init__(self, engine: CpuEngine):
        self._engine = engine
        self.seconds: dict[Phase, float] = {"prefill": 0.0, "decode": 0.0, "slide": 0.0}
        self._zero = combined(counts := engine.stats(), counts, -1)
        self.decoded = self._zero
        self.num_chosen = 0  # while decoding

    def time(self, phase: Phase, work: Callable[[], Result]) -> Result:
        before, start = self._engine.stats(), time.perf_counter()
        result = work()
        self.seconds[phase] += time.perf_counter() - start
        if phase == "decode":
            self.decoded = combined(self.decoded, combined(self._engine.stats(), before, -1), 1)
        return result

    def tokens_within(self, seconds: float) -> int:
        """Return how many tokens are chosen in a time, from those chosen so far (1 before any)."""
        spent = self.seconds["decode"]
        return int(self.num_chosen * seconds / spent) if self.num_chosen and spent else 1

    def per_token(self, count: str) -> float:
        """Return one of the engine's counts for each decoded token."""
        return self.decoded[count] / max(1, self.decoded["tokens"])

    def reuse(self) -> ReuseStats:
        """Return what reuse did to the decoded tokens."""
        return reuse_stats(self.decoded, int(self._engine.header.numbers["intermediate_size"]))

    def prediction(self) -> PredictionStats:
        """Return what the predictor did to the decoded tokens."""
        return prediction_stats(self.decoded, self._engine.header)

    def sparsity(self) -> dict[str, list[float]]:
        return self._engine.sparsity(self._zero, self.decoded) if self.decoded["tokens"] else {}


def combined(a: Any, b: Any, sign: int) -> Any:
    """Return a + sign * b, of numbers in lists and dicts of the same shape."""
    if isinstance(a, dict):
        return {key: combined(value, b[key], sign) for key, value in a.items()}
    if isinstance(a, list):
        return [combined(x, y, sign) for x, y in zip(a, b, strict=True)]
    return a + sign * b
