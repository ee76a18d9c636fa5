"""The laws of activation over training tokens: the paper's tables as oracles, and fits that find them."""

import numpy as np
import pytest

from relufy.errors import UserError
from relufy.measure.laws import Falling, Rising, fit_law, points_of

RELU = {
    "0.1B": Falling(0.101, -0.0151, 3.20, 0.0614),
    "0.2B": Falling(0.449, -3.05, 0.286, 0.0674),
    "0.4B": Falling(0.683, -3.46, 0.079, 0.0690),
    "0.8B": Falling(1.01, -3.49, 7.97e-3, 0.0721),
    "1.2B": Falling(1.33, -3.89, 9.03e-4, 0.0782),
    "2.4B": Falling(1.53, -3.46, 1.56e-4, 0.0648),
}
SILU = {
    "0.1B": Rising(0.479, 0.102, 0.409),
    "0.2B": Rising(0.844, 0.208, 0.390),
    "0.4B": Rising(1.03, 0.420, 0.385),
    "0.8B": Rising(0.995, 0.562, 0.383),
    "1.2B": Rising(0.967, 0.538, 0.382),
}
TOKENS = np.geomspace(2, 800, 40)


def test_the_papers_values() -> None:
    assert RELU["2.4B"].at(800) == pytest.approx(0.0652, abs=5e-5)
    assert RELU["0.1B"].at(100) == pytest.approx(0.0674, abs=5e-5)
    assert SILU["0.4B"].at(100) == pytest.approx(0.3813, abs=5e-5)


@pytest.mark.parametrize(
    ("name", "law"), [("falling", law) for law in RELU.values()] + [("rising", law) for law in SILU.values()]
)
def test_the_papers_curves_are_found_again(name: str, law: Falling | Rising) -> None:
    """Curves, not coefficients: those of the small models are ill-conditioned."""
    found = fit_law(TOKENS, law.at(TOKENS), name)
    assert found.error < 2e-4 and found.points == 40
    assert found.law.at(TOKENS) == pytest.approx(law.at(TOKENS), abs=1e-3)


def test_well_conditioned_coefficients_are_found_again() -> None:
    found = fit_law(TOKENS, RELU["1.2B"].at(TOKENS), "falling").law
    assert found.alpha == pytest.approx(1.33, rel=0.02) and found.limit == pytest.approx(0.0782, rel=0.01)
    rising = fit_law(TOKENS, SILU["0.8B"].at(TOKENS), "rising").law
    assert (rising.alpha, rising.c, rising.limit) == pytest.approx((0.995, 0.562, 0.383), rel=1e-3)


def test_noise_moves_the_curve_by_less_than_itself() -> None:
    noise = np.random.default_rng(0).normal(0, 0.001, len(TOKENS))
    found = fit_law(TOKENS, RELU["0.8B"].at(TOKENS) + noise, "falling")
    assert np.abs(found.law.at(TOKENS) - RELU["0.8B"].at(TOKENS)).max() < 0.001
    assert found.error < 0.0015


def test_the_law_of_a_small_run() -> None:
    """Thousandths of a billion tokens: the scale of D is no part of the fit."""
    tokens = np.geomspace(1e-4, 2e-2, 30)
    law = Falling(0.8, -1.2, 300.0, 0.1)
    assert fit_law(tokens, law.at(tokens), "falling").law.at(tokens) == pytest.approx(
        law.at(tokens), abs=1e-3
    )


def test_a_law_that_does_not_fit_is_told_by_its_error() -> None:
    active = RELU["0.8B"].at(TOKENS)
    assert fit_law(TOKENS, active, "rising").error > 10 * fit_law(TOKENS, active, "falling").error


def test_points_of_a_log() -> None:
    logs = [
        {"step": i, "tokens": i * 10**6, "sparsity": {"neuron": [0.5, 0.7], "down": [0.9]}}
        for i in range(1, 21)
    ]
    logs.append({"step": 21, "loss": 1.0})
    tokens, active = points_of(logs, skip=0.25, smoothed=4)
    assert tokens == pytest.approx([0.0065, 0.0105, 0.0145, 0.0185])
    assert active == pytest.approx([0.4] * 4)
    assert points_of(logs, "down", 0.0, 1)[1] == pytest.approx([0.1] * 20)
    with pytest.raises(UserError, match="no report with tokens and the sparsity of q"):
        points_of(logs, "q")


def test_what_cannot_be_fitted() -> None:
    with pytest.raises(UserError, match="6 points or more, found 3"):
        fit_law([1, 2, 3], [0.1, 0.1, 0.1], "falling")
    with pytest.raises(UserError, match="no law 'fall'"):
        fit_law(TOKENS, TOKENS, "fall")
    with pytest.raises(UserError, match="above 0"):
        fit_law([0, *TOKENS], [0.1, *RELU["0.8B"].at(TOKENS)], "falling")
