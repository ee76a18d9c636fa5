"""Correcting the scores by what is measured: at the best masks, every mask should pay the same.

Each mask is loosened a little while all others stay. What that takes from KL(dense || masked), over what it
would save, is that mask's rate of exchange; where it differs from the others', a factor moves its threshold.
This sees what scores do not: how masks act on each other, and what second order misses. It uses calibration
text alone, so the selection text stays fit for decisions.
"""

import statistics
from collections.abc import Sequence

from relufy.methods.budget.allocate import Choice, as_found
from relufy.methods.budget.cost import Cost, Place
from relufy.methods.budget.options import Chosen, Factors, Prices
from relufy.methods.budget.trial import Trials

LOOSENED = 0.75
"""What thresholds are multiplied by, to see what their masks are worth."""
DAMPING = 0.5
LARGEST_STEP = 2.0


def refined(
    trials: Trials, choices: Sequence[Choice], prices: Prices, factors: Factors
) -> dict[Place, float]:
    """Return better factors, from the measured rates of exchange of the chosen masks."""
    masks = [choice.chosen for choice in choices]
    nats, cost = trials.kl(as_found(masks))
    found = dict(factors)
    for groups in (_by_site(masks), _by_layer(masks)):
        rates: dict[frozenset[Place], float] = {}
        for group in groups:
            others = [mask.moved(LOOSENED) if mask.option.place in group else mask for mask in masks]
            less, more = trials.kl(as_found(others))
            lost = _price(more, prices) - _price(cost, prices)
            if lost > 0:
                rates[group] = (nats - less) / lost
        usual = statistics.median(rates.values()) if rates else 0.0
        for group, rate in rates.items() if usual > 0 else ():
            for place in group:
                found[place] = found.get(place, 1.0) * _step(rate / usual)
    return found


def _by_site(masks: Sequence[Chosen]) -> list[frozenset[Place]]:
    sites = dict.fromkeys(mask.option.sites for mask in masks)
    return [frozenset(m.option.place for m in masks if m.option.sites == site) for site in sites]


def _by_layer(masks: Sequence[Chosen]) -> list[frozenset[Place]]:
    layers = dict.fromkeys(mask.option.layer for mask in masks)
    return [frozenset(m.option.place for m in masks if m.option.layer == layer) for layer in layers]


def _step(ratio: float) -> float:
    """Return what a factor is multiplied by; a rate at or below 0 is noise about a free mask."""
    step = max(ratio, 1e-3) ** DAMPING
    return min(max(step, 1 / LARGEST_STEP), LARGEST_STEP)


def _price(cost: Cost, prices: Prices) -> float:
    return cost.bytes if prices.weighting == "bytes" else cost.seconds
