"""How likely the engine finds continuations of contexts: each context is read once for all that follow.

Contexts that begin alike share what they begin with, through the KV cache. A whole text is scored as a
prompt: masks of phase "decode" leave it dense, as in one forward pass of the Hugging Face model.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from relufy.engine.cpu import CpuEngine
from relufy.errors import UserError

LOGITS_BYTES = 1 << 26
"""About the most memory that the logits of one step take."""
BLOCK = 32
"""Positions in a block of the KV cache."""

Tokens = tuple[int, ...]
Told = list[tuple[float, bool]]
"""The logarithm of each token's probability, and whether it is the likeliest, in order."""


@dataclass(frozen=True)
class Score:
    """The natural logarithm of a continuation's probability; whether each of its tokens is the likeliest."""

    logprob: float
    is_greedy: bool


@dataclass(frozen=True)
class _Branch:
    """What follows the first token of a continuation; the score of its tokens is added to `told`."""

    told: Told
    context: Tokens
    is_only: bool
    """Whether nothing else follows this context, so that its sequence can be used up."""
    fed: Tokens
    expected: Tokens


def score_continuations(
    engine: CpuEngine,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int = 8,
    done: Callable[[int], object] = lambda count: None,
) -> list[Score]:
    """Return the score of each (context, continuation) pair of token lists, neither of them empty.

    `batch_size` contexts are read at once, if the engine's context has room for them: the scores are the same
    bits whatever it is. `done` is called with the number of pairs finished since its last call. Raises
    UserError for a pair that is empty or does not fit.
    """
    for context, continuation in pairs:
        _check(engine, len(context), len(continuation))
    told: list[Told] = [[] for _ in pairs]
    asked: dict[Tokens, list[int]] = {}
    for index, (context, _) in enumerate(pairs):
        asked.setdefault(tuple(context), []).append(index)
    for wave in _waves(engine, sorted(asked), batch_size):
        _score_wave(engine, {c: [(pairs[i][1], told[i]) for i in asked[c]] for c in wave})
        done(sum(len(asked[context]) for context in wave))
    return [Score(math.fsum(p for p, _ in tokens), all(best for _, best in tokens)) for tokens in told]


def _check(engine: CpuEngine, context: int, continuation: int) -> None:
    if not context or not continuation:
        raise UserError("a context and its continuation must have at least one token each")
    if context + continuation - 1 > engine.context:
        raise UserError(
            f"{context} and {continuation} tokens do not fit the context of {engine.context}; shorten them"
        )


def _waves(engine: CpuEngine, contexts: Sequence[Tokens], batch_size: int) -> Iterator[list[Tokens]]:
    """Yield contexts to be read together, in order, so that at least one continuation still has room."""
    wave: list[Tokens] = []
    free = room = engine.free_positions - engine.context - 2 * BLOCK
    for context in contexts:
        needed = _blocks(len(context))
        if wave and (len(wave) >= batch_size or needed > free):
            yield wave
            wave, free = [], room
        wave.append(context)
        free -= needed
    if wave:
        yield wave


def _blocks(positions: int) -> int:
    """Return the positions of the whole blocks that hold these."""
    return math.ceil(positions / BLOCK) * BLOCK


def _score_wave(engine: CpuEngine, wave: Mapping[Tokens, list[tuple[Sequence[int], Told]]]) -> None:
    sequences: dict[Tokens, int] = {}
    try:
        branches = []
        for (context, asked), row in zip(wave.items(), _read(engine, list(wave), sequences), strict=True):
            for continuation, told in asked:
                told += _tell(row[None], continuation[:1])
                if len(continuation) > 1:
                    branches.append(
                        _Branch(
                            told, context, len(asked) == 1, tuple(continuation[:-1]), tuple(continuation[1:])
                        )
                    )
        _score_branches(engine, branches, sequences)
    finally:
        for sequence in sequences.values():
            engine.free(sequence)


def _read(engine: CpuEngine, contexts: list[Tokens], sequences: dict[Tokens, int]) -> np.ndarray:
    """Read contexts into sequences of their own; return the logits after each, [contexts, vocab]."""
    shared = _shared(contexts[0], contexts[-1])
    if len(contexts) > 1 and len(shared) > BLOCK:
        first = _begin(engine, shared)
        engine.step([(first[0], first[1])], "none")
        engine.free(first[0])  # its blocks stay in the cache, for reuse_prefix
    work = []
    for context in contexts:
        sequence, rest = _begin(engine, context)
        sequences[context] = sequence
        work.append((sequence, rest))
    return engine.step(work, "last")


def _shared(first: Tokens, last: Tokens) -> Tokens:
    """Return what two contexts begin with, and so do all that lie between them in order."""
    pairs = zip(first, last, strict=False)
    return first[: next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(last)))]


def _begin(engine: CpuEngine, tokens: Tokens) -> tuple[int, Tokens]:
    """Return a sequence with what of the tokens the cache holds, and the others."""
    sequence = engine.new_sequence(prompt_length=engine.context)
    return sequence, tokens[engine.reuse_prefix(sequence, tokens) :]


def _score_branches(engine: CpuEngine, branches: Sequence[_Branch], sequences: dict[Tokens, int]) -> None:
    """Score what follows the first tokens, for as many branches at once as there is room for."""
    most_rows = max(1, LOGITS_BYTES // (4 * engine.vocab_size))
    together: list[_Branch] = []
    for branch in branches:
        wanted = [*together, branch]
        needed = sum(_blocks(len(b.fed)) + BLOCK for b in wanted)
        if together and (sum(len(b.fed) for b in wanted) > most_rows or needed > engine.free_positions):
            _score_together(engine, together, sequences, most_rows)
            together = []
        together.append(branch)
    if together:
        _score_together(engine, together, sequences, most_rows)


def _score_together(
    engine: CpuEngine, branches: Sequence[_Branch], sequences: dict[Tokens, int], most_rows: int
) -> None:
    forks: list[int] = []
    try:
        for branch in branches:
            sequence = sequences[branch.context]
            forks.append(sequences.pop(branch.context) if branch.is_only else engine.fork(sequence))
        size = max(1, most_rows // len(branches))
        for start in range(0, max(len(branch.fed) for branch in branches), size):
            at = [
                (fork, branch)
                for fork, branch in zip(forks, branches, strict=True)
                if len(branch.fed) > start
            ]
            logits = engine.step([(fork, branch.fed[start : start + size]) for fork, branch in at], "all")
            row = 0
            for _, branch in at:
                expected = branch.expected[start : start + size]
                branch.told.extend(_tell(logits[row : row + len(expected)], expected))
                row += len(expected)
    finally:
        for fork in forks:
            engine.free(fork)


def _tell(logits: np.ndarray, expected: Sequence[int]) -> Told:
    """Return what logits, [tokens, vocab], say of the tokens."""
    most = logits.max(axis=1)
    chosen = logits[np.arange(len(expected)), list(expected)]
    mass = np.exp(logits - most[:, None]).sum(axis=1, dtype=np.float64)
    logprobs = chosen.astype(np.float64) - most - np.log(mass)
    if not np.isfinite(logprobs).all():
        raise UserError("the model's logits are not numbers; its weights or activations overflow")
    is_best = logits.argmax(axis=1) == np.asarray(expected)
    return list(zip(logprobs.tolist(), is_best.tolist(), strict=True))
