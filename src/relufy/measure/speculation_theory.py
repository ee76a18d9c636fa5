"""What speculative decoding should bring, by formula, where reading weights is all the work.

Symbols as in the papers: alpha, the chance that a proposed token is accepted; gamma, the tokens proposed in
a round; c, the time of a draft's token over that of one dense token of the model. Sparsity enters as shares
of a dense token's bytes: s of one token, s_agg(n) of n tokens verified together (what none of them needs).
Only a share phi of the model can be skipped at all (the paper's own formulas have phi = 1).

Sources: Mirzadeh et al. 2023, ReLU Strikes Back, section 5.2 (speculative decoding with aggregated sparsity);
Leviathan et al. 2023, Fast Inference from Transformers via Speculative Decoding, equation 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from relufy.errors import UserError

MOST_GAMMA = 64


@dataclass(frozen=True)
class Costs:
    """What a round is made of: `draft` is c, `phi` the share of the model that can be skipped."""

    draft: float
    phi: float = 1.0

    def __post_init__(self) -> None:
        if not self.draft >= 0:
            raise UserError(f"the cost of a draft must be 0 or more, found {self.draft:g}")
        if not 0 <= self.phi <= 1:
            raise UserError(f"phi must be at least 0 and at most 1, found {self.phi:g}")

    def round(self, gamma: int, union_sparsity: float = 0.0) -> float:
        """Return the time of a round in dense tokens: of gamma drafts and a verification."""
        _check_share("the union sparsity", union_sparsity)
        return self.draft * gamma + 1 - self.phi * union_sparsity

    def token(self, sparsity: float) -> float:
        """Return the time of one plain token, in dense tokens."""
        _check_share("the sparsity", sparsity)
        return 1 - self.phi * sparsity


def tokens_per_round(alpha: float, gamma: int) -> float:
    """Return (1 - alpha^(gamma + 1)) / (1 - alpha): accepted tokens and the model's own one after them."""
    _check_share("alpha", alpha)
    return gamma + 1.0 if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)


def speedup_over_dense_speculation(costs: Costs, gamma: int, union_sparsity: float) -> float:
    """Return the gain of verifying sparsely: S_std, (c gamma + 1) / (c gamma + 1 - phi s_agg)."""
    return costs.round(gamma) / costs.round(gamma, union_sparsity)


def speedup_over_dense(costs: Costs, alpha: float, gamma: int, union_sparsity: float) -> float:
    """Return the gain over plain decoding of the dense model: S_ar."""
    return tokens_per_round(alpha, gamma) / costs.round(gamma, union_sparsity)


def speedup_over_sparse(
    costs: Costs, alpha: float, gamma: int, sparsity: float, union_sparsity: float
) -> float:
    """Return the gain over plain decoding of the sparse model itself: S_ar (1 - phi s).

    `union_sparsity` is that of gamma + 1 tokens, which is what a verification reads.
    """
    return speedup_over_dense(costs, alpha, gamma, union_sparsity) * costs.token(sparsity)


@dataclass(frozen=True)
class Gains:
    """Speed-ups of sparse speculative decoding."""

    over_sparse: float
    over_dense: float
    over_dense_speculation: float


def gains(
    costs: Costs, alpha: float, gamma: int, sparsity: float, union_sparsity: float, share: float = 1.0
) -> Gains:
    """Return all three gains where a share of the rounds has proposals and the others are plain tokens.

    With a share of 1 these are the formulas above; lookup often finds nothing to propose.
    """
    _check_share("the share of rounds", share)
    tokens = 1 - share + share * tokens_per_round(alpha, gamma)
    cost = (1 - share) * costs.token(sparsity) + share * costs.round(gamma, union_sparsity)
    dense_cost = 1 - share + share * costs.round(gamma)
    over_dense = tokens / cost
    return Gains(over_dense * costs.token(sparsity), over_dense, dense_cost / cost)


def random_union_sparsity(sparsity: float, num_tokens: int) -> float:
    """Return s^n: what n tokens would leave unused if they chose their neurons independently."""
    _check_share("the sparsity", sparsity)
    return sparsity**num_tokens


def best_gamma(
    costs: Costs,
    alpha: float,
    sparsity: float,
    union_sparsity: Callable[[int], float],
    most: int = MOST_GAMMA,
) -> tuple[int, float]:
    """Return the gamma with the greatest gain over plain sparse decoding, and that gain; (0, 1) if none wins.

    `union_sparsity` gives s_agg of a number of tokens.
    """
    gains = [
        (speedup_over_sparse(costs, alpha, gamma, sparsity, union_sparsity(gamma + 1)), -gamma)
        for gamma in range(1, most + 1)
    ]
    gain, gamma = max(gains, default=(0.0, 0))
    return (-gamma, gain) if gain > 1 else (0, 1.0)


def most_from_drafts(costs: Costs, sparsity: float) -> float:
    """Return the gain over plain sparse decoding that nothing can pass: its token's time over a draft's."""
    return costs.token(sparsity) / costs.draft if costs.draft else float("inf")


def interpolated(measured: Sequence[tuple[int, float]]) -> Callable[[int], float]:
    """Return s_agg by number of tokens from measured pairs: linear between them, flat outside."""
    if not measured:
        raise UserError("no union sparsity was measured")
    points = sorted(measured)

    def value(number: int) -> float:
        if number <= points[0][0]:
            return points[0][1]
        for (a, at_a), (b, at_b) in pairwise(points):
            if number <= b:
                return at_a + (at_b - at_a) * (number - a) / (b - a)
        return points[-1][1]

    return value


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{name} must be at least 0 and at most 1, found {value:g}")
