"""Speculative decoding of one request: a typed layer over the C++ loop, and the check of vocabularies."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

from relufy.engine import _cpu
from relufy.engine.cpu import GREEDY, MAX_TOKEN, CpuEngine, check_whole, native_sampling, token_array
from relufy.engine.generation_stats import combined
from relufy.engine.sampling import Chosen, Sampling
from relufy.engine.speculation import MIN_MATCH, Speculation, SpeculationStats
from relufy.engine.tokenizer import ModelTokenizer
from relufy.errors import UserError


class Speculator:
    """Decodes one request's text by `speculation`; `draft` is the engine of its draft model, if it has one.

    Raises UserError if the two models do not share their vocabulary, or the draft has fewer positions.
    """

    def __init__(self, engine: CpuEngine, speculation: Speculation, draft: CpuEngine | None = None):
        if speculation.is_self:
            engine.check_reuse()
        if draft is not None:
            check_vocabulary(engine, draft)
            _check_positions(engine, draft)
        self._engine = engine
        self._native: _cpu.Speculator | None = _cpu.Speculator(
            engine.native,
            draft and draft.native,
            speculation.gamma,
            speculation.adaptive,
            float(speculation.min_probability or 0),
            speculation.min_match or MIN_MATCH,
            speculation.keeps.window if speculation.keeps else 0,
        )
        self._last: dict[str, Any] = {}

    def read(self, sequence: int, next_token: int) -> None:
        """Let the draft model read a sequence and the token after it now, not in the first round."""
        self._engine.checked(self._open().read, sequence, next_token)

    def decode(
        self,
        sequence: int,
        tokens: Sequence[int],
        count: int,
        most: int,
        stops: Sequence[int] = (),
        sampling: Sampling = GREEDY,
        logprobs: int = 0,
    ) -> list[Chosen]:
        """Extend a sequence as `CpuEngine.decode` does, in whole rounds.

        Ends with the round in which `count` tokens are reached, after `most`, or after one of `stops`.
        """
        check_whole("count", count, 1, MAX_TOKEN)
        check_whole("most", most, count, MAX_TOKEN)
        check_whole("logprobs", logprobs, 0, self._engine.vocab_size)
        limits = int(count), int(most), token_array(stops), native_sampling(sampling), int(logprobs)
        chosen = self._engine.checked(self._open().decode, sequence, token_array(tokens), *limits)
        return [Chosen(*choice) for choice in chosen]

    def stats(self) -> SpeculationStats:
        """Return what was done so far."""
        counts = self._native.counts() if self._native else self._last
        verified = [(size, use) for size, use in enumerate(counts["by_size"]) if use["steps"]]
        engine = self._engine
        return SpeculationStats(
            **{name: counts[name] for name in ("rounds", "drafted", "accepted", "chosen")},
            tested_by_place=tuple(counts["tested_at"]),
            accepted_by_place=tuple(counts["accepted_at"]),
            rounds_by_size={size: use["steps"] for size, use in verified},
            union_sparsity={size: _union_sparsity(engine, use) for size, use in verified},
            bytes_by_size={
                size: (use["weight_bytes"] + use["kv_bytes"]) / use["steps"] for size, use in verified
            },
            sparsity=_sparsity(engine, [use for _, use in verified]),
            draft_seconds=counts["draft_seconds"],
            verify_seconds=counts["verify_seconds"],
            draft_weight_bytes=counts["draft_weight_bytes"],
            draft_kv_bytes=counts["draft_kv_bytes"],
            verify_weight_bytes=sum(use["weight_bytes"] for _, use in verified),
            verify_kv_bytes=sum(use["kv_bytes"] for _, use in verified),
        )

    def close(self) -> None:
        """Give the draft's place in its KV cache back; `stats` stays."""
        if self._native:
            self._last, self._native = self._native.counts(), None

    def _open(self) -> _cpu.Speculator:
        if self._native is None:
            raise UserError("this speculation is over; make another one")
        return self._native


def check_vocabulary(engine: CpuEngine, draft: CpuEngine) -> None:
    """Raise UserError, naming the first difference, unless a token means the same to both models.

    A model may have more rows than its tokenizer has tokens (a padded vocabulary).
    """
    if draft.header.path == engine.header.path:
        return
    mine, its = _tokens_by_id(engine), _tokens_by_id(draft)
    if mine is None or its is None:
        if draft.vocab_size != engine.vocab_size:
            raise _other_vocabulary(
                engine, draft, f"it has {draft.vocab_size} tokens, the model {engine.vocab_size}"
            )
        return
    for token in sorted(mine.keys() | its.keys()):
        if mine.get(token) != its.get(token):
            what = f"token {token} is {its.get(token)!r} there, {mine.get(token)!r} in the model"
            raise _other_vocabulary(engine, draft, what)


def _other_vocabulary(engine: CpuEngine, draft: CpuEngine, what: str) -> UserError:
    return UserError(
        f"{draft.header.path.name} can't draft for {engine.header.path.name}: its vocabulary is another one "
        f"({what}); take a draft of the same tokenizer, or lookup"
    )


def _check_positions(engine: CpuEngine, draft: CpuEngine) -> None:
    if draft.context < engine.context:
        raise UserError(
            f"the draft {draft.header.path.name} has {draft.context} positions, fewer than the model's "
            f"{engine.context}; open the model with --context {draft.context}, or take another draft"
        )


def _tokens_by_id(engine: CpuEngine) -> dict[int, str] | None:
    """Return a model's tokens, or None if it carries no tokenizer."""
    if engine.header.blob("tokenizer.json") is None:
        return None
    return ModelTokenizer(engine.header).vocabulary()


def _sparsity(engine: CpuEngine, uses: list[dict[str, Any]]) -> dict[str, list[float]]:
    if not uses:
        return {}
    total = reduce(lambda a, b: combined(a, b, 1), uses)
    return engine.sparsity(combined(total, total, -1), total)


def _union_sparsity(engine: CpuEngine, use: dict[str, Any]) -> float:
    zero = combined(use, use, -1)
    by_layer = engine.union_density(zero, use, use["steps"]).get("neuron")
    return 1 - sum(by_layer) / len(by_layer) if by_layer else 0.0
