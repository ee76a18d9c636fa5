"""Neuron reuse at a window: by hand, by its definition, and streamed as at once."""

import numpy as np
import pytest
import torch
from tests.measure.made_traces import bernoulli, trace

from relufy.errors import UserError
from relufy.measure.token_sample import TokenSample
from relufy.measure.windowed_reuse import Reuse, ReuseCounts, reuse_sums


def reuse(parts: list, windows: tuple[int, ...]) -> Reuse:
    sample = TokenSample(1)
    counts = ReuseCounts(1, sample, windows)
    for one in parts:
        sample.add(one)
        counts.add(one)
    return counts.result()


def test_by_hand() -> None:
    """Token 2, the first with two before it, reuses neuron 1 from one back and 0 from two back."""
    active = [[1, 0, 0], [0, 1, 0], [1, 1, 1], [1, 0, 0]]
    found = reuse([trace([active])], (1, 2))
    assert found.measured[0] == pytest.approx([(1 / 3 + 1) / 2, (2 / 3 + 1) / 2])
    assert found.tokens == (2,)


def test_silent_tokens_have_no_share() -> None:
    found = reuse([trace([[[1, 0], [0, 0], [1, 0]]])], (1,))
    assert found.tokens == (1,) and found.measured[0] == (0.0,)


def test_by_definition() -> None:
    active = bernoulli(np.linspace(0.05, 0.5, 31), 1, 40)[0]
    windows = (1, 3, 8)
    sums, tokens = reuse_sums(torch.from_numpy(active), windows)
    for window, found in zip(windows, sums.tolist(), strict=True):
        shares = [
            (active[t] & active[t - window : t].any(0)).sum() / active[t].sum()
            for t in range(8, 40)
            if active[t].any()
        ]
        assert tokens == len(shares)
        assert found / 2**32 == pytest.approx(sum(shares), abs=1e-6)


def test_independent_tokens_reuse_1_minus_s_to_the_w() -> None:
    found = reuse([trace(bernoulli(np.full(300, 0.2), 20, 60))], (1, 2, 4))
    for curve in ("measured", "shuffled"):
        assert getattr(found, curve)[0] == pytest.approx([1 - 0.8**w for w in (1, 2, 4)], abs=0.01)


def test_parts_give_what_all_gives_and_padding_is_no_token() -> None:
    active = bernoulli(np.linspace(0, 0.6, 43), 6, 15)
    active[3, 8:] = False
    lengths = [15, 15, 15, 8, 15, 15]
    whole = reuse([trace(active, lengths=lengths)], (1, 4))
    parts = [trace(active[i : i + 2], first=i, lengths=lengths[i : i + 2]) for i in (4, 0, 2)]
    assert reuse(parts, (1, 4)) == whole
    assert whole.tokens == (5 * 11 + 4,)


def test_a_window_of_no_token_is_refused() -> None:
    with pytest.raises(UserError, match="1 token or more"):
        ReuseCounts(1, TokenSample(1), (0, 2))
