"""Co-activation gaps: by hand, of neurons that fire independently, and streamed as at once."""

import numpy as np
import pytest
from tests.measure.made_traces import bernoulli, trace

from relufy.measure.coactivation import CoActivation, CoActivationCounts


def coactivation(parts: list, neurons: int = 512) -> CoActivation:
    counts = CoActivationCounts(1, neurons)
    for one in parts:
        counts.add(one)
    return counts.result()


def test_by_hand() -> None:
    """Neuron 0 fires at tokens 0 1 2 3, neuron 1 at 0 1, neuron 2 at 3, neuron 3 never."""
    found = coactivation([trace([[[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0]]])])
    gaps = [2 / 4 - (2 / 4 + 1 / 4) / 3, 1 - 1 / 3, 1 - 1 / 3]
    rates = [2 / 4 - (2 / 4 + 1 / 4) / 3, 1 - (1 + 1 / 4) / 3, 1 - (1 + 2 / 4) / 3]
    assert found.gap == (pytest.approx(np.mean(gaps)),)
    assert found.independent == (pytest.approx(np.mean(rates)),)
    assert (found.silent, found.tokens, found.neurons) == ((1,), 4, 4)


def test_independent_neurons_have_the_gap_of_independent_neurons() -> None:
    found = coactivation([trace(bernoulli(np.linspace(0.1, 0.6, 30), 40, 200))])
    assert found.gap[0] == pytest.approx(found.independent[0], abs=0.03)


def test_pairs_have_a_wide_gap() -> None:
    half = bernoulli(np.full(20, 0.2), 10, 100)
    found = coactivation([trace(np.concatenate([half, half], axis=-1))])
    assert found.gap[0] > 0.7 > 0.1 > found.independent[0]


def test_parts_give_what_all_gives_and_padding_is_no_token() -> None:
    active = bernoulli(np.linspace(0, 0.5, 43), 6, 15)
    active[3, 8:] = False
    lengths = [15, 15, 15, 8, 15, 15]
    whole = coactivation([trace(active, lengths=lengths)], 20)
    parts = [trace(active[i : i + 2], first=i, lengths=lengths[i : i + 2]) for i in (4, 0, 2)]
    assert coactivation(parts, 20) == whole
    assert whole.tokens == sum(lengths) and whole.neurons == 20


def test_a_silent_layer_has_no_gap() -> None:
    found = coactivation([trace(np.zeros((1, 5, 4)))])
    assert (found.gap, found.silent) == ((0.0,), (4,))
