"""Perplexity of texts: every token once, bytes and words as they are, whatever the windows and pieces."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

import relufy
from relufy.errors import UserError
from relufy.evaluation.backends import open_backend
from relufy.evaluation.options import EvalOptions
from relufy.evaluation.text import text_scores, text_windows

TEXT = "It was a dark night.\n\n\u201cNa\u00efve\u201d, he said;  \U0001f600 and\u00a0more words.\n" * 4


def by_letters(text: str) -> tuple[list[int], list[int]]:
    """Encode one token for two characters."""
    ends = [*range(2, len(text) + 1, 2)]
    ends += [len(text)] * (len(text) % 2)
    return [100 + ord(text[end - 1]) % 50 for end in ends], ends


def tokens_predicted(pieces: Sequence[str], length: int, bos: int | None) -> list[int]:
    return [token for window in text_windows(pieces, by_letters, length, bos) for token in window.tokens[1:]]


@pytest.mark.parametrize("length", [2, 3, 7, 1000])
def test_every_token_is_predicted_once(length: int) -> None:
    ids, _ = by_letters(TEXT)
    assert tokens_predicted([TEXT], length, 0) == ids
    assert tokens_predicted([TEXT], length, None) == ids[1:]


@pytest.mark.parametrize("length", [2, 3, 7])
def test_windows_open_with_the_token_that_begins_texts_or_the_one_before(length: int) -> None:
    ids, _ = by_letters(TEXT)
    assert {window.tokens[0] for window in text_windows([TEXT], by_letters, length, 0)} == {0}
    before = [window.tokens[0] for window in text_windows([TEXT], by_letters, length, None)]
    assert before == ids[:-1:length - 1]  # fmt: skip


@given(st.text(min_size=1), st.integers(2, 9))
def test_bytes_and_words_are_those_of_the_text(text: str, length: int) -> None:
    text = text.encode("utf-8", "ignore").decode()
    if not text:
        return
    windows = list(text_windows([text], by_letters, length, 0))
    assert sum(window.bytes for window in windows) == len(text.encode())
    assert sum(window.words for window in windows) == len(text.split())


@given(
    st.lists(st.sampled_from(["word ", "two words", " ", "\n", "\u00e9t\u00e9\n"]), min_size=1, max_size=9)
)
def test_pieces_are_the_whole_text(pieces: list[str]) -> None:
    whole = "".join(pieces)
    windows = list(text_windows(pieces, by_letters, 5, 0))
    assert sum(window.bytes for window in windows) == len(whole.encode())
    assert sum(window.words for window in windows) == len(whole.split())


def test_a_text_without_a_token_to_predict_is_refused() -> None:
    with pytest.raises(UserError, match="too short"):
        list(text_windows(["ab"], by_letters, 8, None))
    with pytest.raises(UserError, match="too short"):
        list(text_windows([""], by_letters, 8, 0))


def test_scores_per_token_byte_and_word_are_one_loss() -> None:
    windows = [w.without_tokens() for w in text_windows([TEXT], by_letters, 9, 0)]
    logprobs = [-2.0 * window.num_predicted - index for index, window in enumerate(windows)]
    token, byte, word, bits = text_scores(windows, logprobs)
    nats = -sum(logprobs)
    assert math.log(token.value) * sum(w.num_predicted for w in windows) == pytest.approx(nats)
    assert math.log(byte.value) * len(TEXT.encode()) == pytest.approx(nats)
    assert math.log(word.value) * len(TEXT.split()) == pytest.approx(nats)
    assert bits.value == pytest.approx(math.log2(byte.value))
    assert len(set(token.documents)) == len(windows)


@pytest.mark.parametrize("backend", ["hf", "engine"])
def test_both_backends_say_what_measure_says(bundled, backend: str) -> None:
    from relufy.measure.quality import perplexity
    from relufy.text import token_windows

    found = open_backend(bundled, EvalOptions(backend=backend, batch_size=3))  # type: ignore[arg-type]
    text = "The captain looked at the sea, and the sea looked back at him. " * 9
    windows = list(text_windows([text], found.encode, 32, found.bos))
    logprobs = found.logprobs([window.tokens for window in windows])
    tokenizer = relufy.load_tokenizer(bundled)
    expected = perplexity(
        relufy.load_model(bundled),
        token_windows(text, lambda part: tokenizer(part, add_special_tokens=False).input_ids, 32, 0),
    )
    whole = [
        -logprob / 31 for logprob, window in zip(logprobs, windows, strict=True) if len(window.tokens) == 32
    ]
    assert whole == pytest.approx(list(expected.per_window), rel=1e-4)
    assert len(windows) == len(whole) + 1
    assert sum(window.bytes for window in windows) == len(text.encode())
    assert sum(window.words for window in windows) == len(text.split())
