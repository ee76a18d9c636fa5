"""Correcting the scores by what is measured: at the best masks, every mask should pay the same.

Each mask is loosened a little while all others stay. What that takes from KL(dense || masked), over what it
would save, is that mask's rate of exchange; where it differs from the others', a factor moves its threshold.
This sees what scores do not: how masks act on each other, and what second order misses. It uses calibration
text alone, so the selection text stays fit for decisions.
"""

import math
import statistics
from collections.abc import Sequence

from relufy.methods.auto_allocate import Choice, as_found
from relufy.methods.auto_cost import Cost, Place
from relufy.methods.auto_options import Factors, Prices
from relufy.methods.auto_trial import Trials

LOOSENED = 0.75
"""What a threshold is multiplied by, to see what its mask is worth."""
DAMPING = 0.5
LARGEST_STEP = 2.0


def refined(trials: Trials, choices: Sequence[Choice], prices: Prices, factors: Factors) -> dict[Place, float]:
    """Return better factors, from the measured rates of exchange of the chosen masks."""
    masks = [choice.chosen for choice in choices]
    nats, cost = trials.kl(as_found(masks))
    rates: dict[Place, float] = {}
    for index, mask in enumerate(masks):
        others = [*masks[:index], mask.moved(LOOSENED), *masks[index + 1 :]]
        less, more = trials.kl(as_found(others))
        lost = _price(more, prices) - _price(cost, prices)
        if lost > 0:
            rates[mask.option.place] = (nats - less) / lost
    if not rates:
        return dict(factors)
    usual = statistics.median(rates.values())
    if usual <= 0:
        return dict(factors)
    return dict(factors) | {
        place: factors.get(place, 1.0) * _step(rate / usual) for place, rate in rates.items()
    }


def _step(ratio: float) -> float:
    """Return what a factor is multiplied by; a rate at or below 0 is noise about a mask that costs nothing."""
    step = max(ratio, 1e-3) ** DAMPING
    return math.exp(min(max(math.log(step), -math.log(LARGEST_STEP)), math.log(LARGEST_STEP)))


def _price(cost: Cost, prices: Prices) -> float:
    return cost.bytes if prices.weighting == "bytes" else cost.seconds
