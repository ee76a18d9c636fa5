"""Aggregated sparsity: unions by hand, the baselines' laws, streamed as at once."""

import numpy as np
import pytest
from tests.measure.made_traces import bernoulli, trace

from relufy.measure.aggregated import Aggregated, AggregatedCounts, independent_sparsity
from relufy.measure.token_sample import TokenSample, scrambled


def aggregated(parts: list[list], sample: int = 4096) -> Aggregated:
    """Return the result of batches, each a list of layers' traces."""
    tokens = TokenSample(len(parts[0]), sample)
    counts = AggregatedCounts(len(parts[0]), tokens)
    for layers in parts:
        for one in layers:
            tokens.add(one)
            counts.add(one)
    return counts.result()


def test_by_hand() -> None:
    """Window 1 adds neurons 0, 1, then 1, 2, then nothing; window 2 adds 3, nothing, 0."""
    first = [[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0]]
    second = [[0, 0, 0, 1], [0, 0, 0, 1], [1, 0, 0, 0]]
    found = aggregated([[trace([first, second])]])
    assert found.measured == ((1 - 1.5 / 4, 1 - 2 / 4, 1 - 2.5 / 4),)
    assert found.windows == (2, 2, 2)
    assert found.uniform[0] == pytest.approx([(1 - 8 / 24) ** t for t in (1, 2, 3)])
    rates = np.array([3, 2, 1, 2]) / 6
    assert found.independent[0] == pytest.approx([((1 - rates) ** t).mean() for t in (1, 2, 3)])
    deviation = np.std([2 / 4, 1 / 4], ddof=1) / 2**0.5
    assert found.standard_error[0] == pytest.approx(deviation)


def test_independent_tokens_have_s_to_the_t() -> None:
    """On i.i.d. Bernoulli traces measured, shuffled and both closed forms agree."""
    found = aggregated([[trace(bernoulli(np.full(400, 0.1), 60, 20))]])
    expected = 0.9 ** np.arange(1, 21)
    for curve in ("measured", "shuffled", "independent", "uniform"):
        assert getattr(found, curve)[0] == pytest.approx(expected, abs=0.01), curve


def test_unequal_neurons_alone_beat_s_to_the_t() -> None:
    """Half of the neurons are dead: shuffling shows that nothing but this is behind it."""
    rates = np.repeat([0.0, 0.4], 200)
    found = aggregated([[trace(bernoulli(rates, 60, 20))]])
    assert found.measured[0][-1] >= 0.5 > 10 * found.uniform[0][-1]
    assert found.shuffled[0] == pytest.approx(found.measured[0], abs=0.01)
    assert found.independent[0] == pytest.approx(found.measured[0], abs=0.01)


def test_neighbours_that_are_alike_beat_the_shuffled_text() -> None:
    """Each window has ten neurons of its own, of 100."""
    active = np.zeros((10, 20, 100), dtype=bool)
    for window in range(10):
        active[window, :, window * 10 : window * 10 + 10] = True
    found = aggregated([[trace(active)]])
    assert set(found.measured[0]) == {0.9}
    assert found.shuffled[0][-1] < 0.3 and found.independent[0][-1] == pytest.approx(0.9**20)


def test_parts_give_what_all_gives_at_once() -> None:
    active = np.stack([bernoulli(np.linspace(0, 0.6, 43), 7, 11, seed) for seed in (0, 1)])
    lengths = [11, 4, 11, 7, 1, 11, 9]
    for window, length in enumerate(lengths):
        active[:, window, length:] = False

    def parts(size: int) -> list[list]:
        return [
            [
                trace(layer[i : i + size], index, i, lengths[i : i + size])
                for index, layer in enumerate(active)
            ]
            for i in range(0, 7, size)
        ]

    whole = aggregated(parts(7), sample=20)
    assert aggregated(parts(1), sample=20) == aggregated(parts(2), sample=20) == whole
    assert whole.windows == (7, 6, 6, 6, 5, 5, 5, 4, 4, 3, 3)
    assert whole.mean()[4] == whole.at(5)


def test_padding_is_no_token() -> None:
    active = bernoulli(np.full(30, 0.3), 2, 6)
    padded = np.concatenate([active, np.zeros((2, 5, 30), dtype=bool)], axis=1)
    found, plain = (aggregated([[one]]) for one in (trace(padded, lengths=[6, 6]), trace(active)))
    assert found.measured[0][:6] == plain.measured[0] and found.independent[0][:6] == plain.independent[0]
    assert found.windows[6:] == ()


def test_the_sample_is_spread_and_stays_small() -> None:
    sample = TokenSample(1, size=100)
    for first in range(0, 500, 5):
        sample.add(trace(np.ones((5, 20, 9)), first=first))
    (bits,) = sample.layers()
    assert bits.shape == (100, 2)
    hashes = scrambled(np.arange(1 << 16, dtype=np.uint64), 0)
    assert len(set(hashes.tolist())) == 1 << 16
    assert np.bincount((hashes >> np.uint64(60)).astype(int), minlength=16).std() < 100


def test_independent_sparsity_of_no_and_all_neurons() -> None:
    assert independent_sparsity(np.array([0.0, 1.0, 0.5]), 2).tolist() == [0.5, pytest.approx(1.25 / 3)]
