"""Sequences over shared KV blocks, and refusals that change nothing."""

import numpy as np
import pytest

import relufy
from relufy.engine.cpu import OutOfContext
from relufy.engine.pack import pack


@pytest.fixture
def open_engine(make_checkpoint, tmp_path):
    path = pack(make_checkpoint("stage2"), tmp_path / "model.relufy")
    return lambda **options: relufy.Engine(path, **{"threads": 2, **options})


def logits_after(engine: relufy.Engine, tokens: list[int]) -> bytes:
    sequence = engine.new_sequence()
    logits = engine.step([(sequence, tokens)]).tobytes()
    engine.free(sequence)
    return logits


PAST = list(range(2, 42))


@pytest.mark.parametrize("length", [1, 31, 32, 33, 40])
def test_fork_continues_as_the_parent_would(open_engine, length):
    engine = open_engine(context=512)
    parent = engine.new_sequence()
    engine.step([(parent, PAST[:length])])
    child = engine.fork(parent)
    both = engine.step([(parent, [100, 101]), (child, [200])])
    assert both[0].tobytes() == logits_after(engine, [*PAST[:length], 100, 101])
    assert both[1].tobytes() == logits_after(engine, [*PAST[:length], 200])
    engine.free(parent)
    assert engine.step([(child, [300])]).tobytes() == logits_after(engine, [*PAST[:length], 200, 300])


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33])
def test_truncate_forgets(open_engine, length):
    engine = open_engine(context=512)
    sequence = engine.new_sequence()
    engine.step([(sequence, PAST)])
    engine.truncate(sequence, length)
    assert engine.length(sequence) == length
    again = engine.step([(sequence, [100])])
    assert again.tobytes() == logits_after(engine, [*PAST[:length], 100])


def test_rows_of_logits(open_engine):
    engine = open_engine()
    a, b = engine.new_sequence(), engine.new_sequence()
    assert engine.step([(a, [2, 3]), (b, [4])], "none").shape == (0, 513)
    last = engine.step([(a, [5, 6, 7]), (b, [8])], "last")
    engine.truncate(a, 2)
    engine.truncate(b, 1)
    every = engine.step([(a, [5, 6, 7]), (b, [8])], "all")
    assert last.shape == (2, 513) and every.shape == (4, 513)
    assert np.array_equal(last, every[[2, 3]])


@pytest.mark.parametrize(
    ("work", "message"),
    [
        ([(1, [])], "at least one token"),
        ([(1, [513])], "token 513 is not in the vocabulary of 513"),
        ([(1, [-1])], "token -1"),
        ([(1, [2**40])], "vocabulary"),
        ([(1, [1.5])], "whole numbers"),
        ([(1, [[1]])], "flat list"),
        ([(9, [1])], "no sequence 9"),
        ([(1, [1]), (1, [2])], "twice"),
        ([(1, [[1], [2, 3]])], "pairs of a sequence"),
        ([1], "pairs of a sequence"),
        (None, "pairs of a sequence"),
    ],
    ids=[
        "empty",
        "too-large",
        "negative",
        "huge",
        "fraction",
        "nested",
        "no-sequence",
        "twice",
        "ragged",
        "no-pair",
        "none",
    ],
)
def test_bad_work_is_refused_and_changes_nothing(open_engine, work, message):
    engine = open_engine()
    sequence = engine.new_sequence()
    engine.step([(sequence, [2, 3])])
    with pytest.raises(relufy.UserError, match=message):
        engine.step(work)
    assert engine.length(sequence) == 2
    assert engine.step([(sequence, [4])]).tobytes() == logits_after(engine, [2, 3, 4])


def test_the_context_is_shared_and_its_end_is_an_error(open_engine):
    engine = open_engine(context=64)
    a, b = engine.new_sequence(), engine.new_sequence()
    engine.step([(a, PAST)])
    with pytest.raises(OutOfContext, match="64 positions"):
        engine.step([(a, [1]), (b, [1])])
    assert engine.length(a) == 40 and engine.length(b) == 0
    engine.step([(a, PAST[:24])])
    engine.free(a)
    engine.step([(b, [*PAST, *PAST[:24]])])
    with pytest.raises(OutOfContext):
        engine.step([(b, [1])])


def test_the_models_own_context_is_a_limit(open_engine):
    engine = open_engine(context=1000)
    sequence = engine.new_sequence()
    engine.step([(sequence, [5] * 128)])
    with pytest.raises(OutOfContext, match="128"):
        engine.step([(sequence, [5])])


@pytest.mark.parametrize(
    "options", [{"threads": 0}, {"context": 0}, {"threads": 40000}, {"context": 2**64 - 1}]
)
def test_senseless_options_are_refused(open_engine, options):
    with pytest.raises(relufy.UserError, match="at least 1"):
        open_engine(**options)


def test_an_unknown_instruction_set_is_refused(open_engine, monkeypatch):
    monkeypatch.setenv("RELUFY_ISA", "sse9")
    with pytest.raises(relufy.UserError, match="sse9"):
        open_engine()
