"""Continuations are scored as the model says, whatever else is scored, and each context is read once."""

import numpy as np
import pytest
import torch
from tests.engine.contract import all_at_once, tokens_of

import relufy
from relufy.activation_sparsity import Sparsifier
from relufy.engine import scoring
from relufy.engine.scoring import score_continuations

Pairs = list[tuple[list[int], list[int]]]


@pytest.fixture(scope="module")
def path(make_checkpoint, tmp_path_factory):
    return relufy.pack(make_checkpoint("stage1"), tmp_path_factory.mktemp("packed") / "stage1.relufy")


def opened(path, contexts: int = 20) -> relufy.Engine:
    return relufy.Engine(path, threads=1, context=128 * contexts)


def choices(num_contexts: int, num_choices: int, shared: int = 40) -> Pairs:
    """Return contexts that begin alike, with continuations of one token and of several."""
    generator = np.random.default_rng(1)
    beginning = tokens_of(513, shared)
    pairs = []
    for _ in range(num_contexts):
        context = beginning + generator.integers(2, 513, generator.integers(1, 40)).tolist()
        for _ in range(num_choices):
            pairs.append((context, generator.integers(2, 513, generator.integers(1, 9)).tolist()))
    return pairs


def by_hand(engine: relufy.Engine, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    logits = torch.from_numpy(all_at_once(engine, context + continuation[:-1], prompt_length=128)).double()
    logits = logits[len(context) - 1 :]
    chosen = logits.log_softmax(-1)[range(len(continuation)), continuation]
    return float(chosen.sum()), logits.argmax(-1).tolist() == continuation


def test_equals_the_logits_of_the_whole_text(path) -> None:
    engine, pairs = opened(path), choices(5, 3)
    context = pairs[0][0]
    likeliest = int(all_at_once(engine, context, prompt_length=128)[-1].argmax())
    pairs.append((context, [likeliest]))
    found = score_continuations(engine, pairs)
    for score, (context, continuation) in zip(found, pairs, strict=True):
        logprob, is_greedy = by_hand(engine, context, continuation)
        assert score.logprob == pytest.approx(logprob, rel=1e-6) and score.is_greedy == is_greedy
    assert found[-1].is_greedy and not all(score.is_greedy for score in found)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 17])
def test_the_same_bits_whatever_is_scored_beside_it(path, batch_size: int, monkeypatch) -> None:
    pairs = [*choices(6, 3), ([0], tokens_of(513, 128))]
    alone = [score_continuations(opened(path, 1), [pair])[0] for pair in pairs]
    assert score_continuations(opened(path), pairs, batch_size) == alone
    monkeypatch.setattr(scoring, "LOGITS_BYTES", 4 * 513 * 5)
    assert score_continuations(opened(path, 3), pairs[::-1], batch_size) == alone[::-1]


def test_reads_what_contexts_share_once(path) -> None:
    pairs = choices(6, 4)
    engine = opened(path)
    score_continuations(engine, pairs)
    contexts = {tuple(context) for context, _ in pairs}
    shared = 32  # of the 40 tokens that they begin with, whole blocks
    read = 40 + sum(len(context) - shared for context in contexts)
    tails = sum(len(continuation) - 1 for _, continuation in pairs)
    assert engine.stats()["tokens"] == read + tails
    assert engine.free_positions == 128 * 20  # nothing is left behind


def test_says_how_many_are_done(path) -> None:
    done: list[int] = []
    score_continuations(opened(path), choices(5, 3), 2, done.append)
    assert sum(done) == 15 and len(done) == 3


def test_masks_that_leave_prompts_dense_do_so(make_checkpoint, tmp_path) -> None:
    decoding = Sparsifier(("q", "k", "v"), "topk", k=20, phase="decode")
    checkpoint = make_checkpoint(sparsifiers=(decoding,))
    pairs = choices(2, 2)
    found = score_continuations(opened(relufy.pack(checkpoint, tmp_path / "m.relufy")), pairs)
    model = relufy.load_model(checkpoint)
    for score, (context, continuation) in zip(found, pairs, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(continuation)), continuation].sum()
        assert score.logprob == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        (([], [1]), "at least one token each"),
        (([1], []), "at least one token each"),
        (([1] * 120, [2] * 10), "120 and 10 tokens do not fit the context of 128"),
    ],
    ids=["no context", "no continuation", "too long"],
)
def test_refuses(path, pair, said: str) -> None:
    with pytest.raises(relufy.UserError, match=said):
        score_continuations(opened(path), [pair])
