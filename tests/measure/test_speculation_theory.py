"""The theory of sparse speculative decoding, against the papers' own arithmetic and simple games."""

import random

import pytest

import relufy
from relufy.measure.speculation_theory import (
    Costs,
    best_gamma,
    gains,
    interpolated,
    most_from_drafts,
    random_union_sparsity,
    speedup_over_dense,
    speedup_over_dense_speculation,
    speedup_over_sparse,
    tokens_per_round,
)

ORACLES = [(0.05, 8, 0.5, 1.556, 4.810), (0.05, 16, 0.3, 1.200, 3.258), (0.02, 4, 0.5, 1.862, 5.796)]
"""c, gamma, s_agg -> S_std, and S_ar at alpha 0.8: derived from ReLU Strikes Back's formulas."""


@pytest.mark.parametrize(("c", "gamma", "union", "standard", "plain"), ORACLES)
def test_oracle_values(c, gamma, union, standard, plain):
    assert speedup_over_dense_speculation(Costs(c), gamma, union) == pytest.approx(standard, abs=5e-4)
    assert speedup_over_dense(Costs(c), 0.8, gamma, union) == pytest.approx(plain, abs=5e-4)


@pytest.mark.parametrize(("c", "union"), [(0.02, 0.28), (0.05, 0.38)])
def test_the_papers_gain_at_16_needs_this_much_union_sparsity(c, union):
    """It reports 1.27 at gamma 16."""
    assert speedup_over_dense_speculation(Costs(c), 16, union) == pytest.approx(1.27, abs=0.01)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.3, 1), (0.8, 4), (0.95, 16)])
def test_expected_tokens_are_those_of_a_game(alpha, gamma):
    game = random.Random(0)

    def play() -> int:
        accepted = 0
        while accepted < gamma and game.random() < alpha:
            accepted += 1
        return accepted + 1

    mean = sum(play() for _ in range(40_000)) / 40_000
    assert mean == pytest.approx(tokens_per_round(alpha, gamma), rel=0.02)
    assert tokens_per_round(1.0, gamma) == gamma + 1 and tokens_per_round(0.0, gamma) == 1


def test_phi_scales_what_can_be_skipped():
    costs, all_of_it = Costs(0.1, phi=0.6), Costs(0.1)
    assert speedup_over_dense(costs, 0.7, 4, 0.5) == pytest.approx(speedup_over_dense(all_of_it, 0.7, 4, 0.3))
    over_dense, over_sparse = (
        speedup_over_dense(costs, 0.7, 4, 0.5),
        speedup_over_sparse(costs, 0.7, 4, 0.9, 0.5),
    )
    assert over_sparse == pytest.approx(over_dense * (1 - 0.6 * 0.9))
    assert speedup_over_sparse(costs, 0.7, 4, 0.0, 0.0) == speedup_over_dense(costs, 0.7, 4, 0.0)


@pytest.mark.parametrize(("c", "gamma", "union", "standard", "plain"), ORACLES)
def test_rounds_without_proposals_are_plain_tokens(c, gamma, union, standard, plain):
    costs = Costs(c, phi=0.5)
    every = gains(costs, 0.8, gamma, 0.9, union)
    assert every.over_sparse == pytest.approx(speedup_over_sparse(costs, 0.8, gamma, 0.9, union))
    assert every.over_dense == pytest.approx(speedup_over_dense(costs, 0.8, gamma, union))
    expected = speedup_over_dense_speculation(costs, gamma, union)
    assert every.over_dense_speculation == pytest.approx(expected)
    none = gains(costs, 0.8, gamma, 0.9, union, share=0.0)
    assert none.over_sparse == 1 and none.over_dense == none.over_dense_speculation == 1 / costs.token(0.9)
    assert 1 < gains(costs, 0.8, gamma, 0.9, union, share=0.5).over_sparse < every.over_sparse


def test_a_free_perfect_draft_gains_a_round_of_tokens():
    assert speedup_over_sparse(Costs(0), 1.0, 7, 0.9, 0.9) == pytest.approx(8)


def test_the_best_gamma_is_the_best_and_none_where_none_wins():
    costs = Costs(0.1, phi=0.5)

    def union(num_tokens: int) -> float:
        return random_union_sparsity(0.9, num_tokens)

    gamma, gain = best_gamma(costs, 0.8, 0.9, union)
    gains = {g: speedup_over_sparse(costs, 0.8, g, 0.9, union(g + 1)) for g in range(1, 65)}
    assert gain == max(gains.values()) == gains[gamma] and gamma > 1
    assert best_gamma(Costs(1.0), 0.9, 0.5, union) == (0, 1.0)


def test_no_gamma_passes_the_cost_of_a_draft():
    costs = Costs(0.4, phi=0.5)
    limit = most_from_drafts(costs, 0.8)
    gains = [speedup_over_sparse(costs, 1.0, gamma, 0.8, 0.8) for gamma in range(1, 500)]
    assert limit == pytest.approx(1.5) and gains == sorted(gains) and 0.99 * limit < gains[-1] < limit


def test_measured_union_sparsity_between_and_beyond():
    union = interpolated([(9, 0.3), (1, 0.9), (5, 0.5)])
    assert [union(n) for n in (1, 3, 5, 7, 9, 30)] == pytest.approx([0.9, 0.7, 0.5, 0.4, 0.3, 0.3])


@pytest.mark.parametrize(
    "call",
    [
        lambda: Costs(-0.1),
        lambda: Costs(0.1, phi=1.5),
        lambda: tokens_per_round(1.2, 3),
        lambda: Costs(0.1).token(-0.1),
        lambda: Costs(0.1).round(2, 1.1),
        lambda: interpolated([]),
    ],
)
def test_senseless_numbers_are_refused(call):
    with pytest.raises(relufy.UserError):
        call()
