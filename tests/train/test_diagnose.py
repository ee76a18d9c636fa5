"""Diagnoses speak of what is wrong, one line each, and are silent on runs that are well."""

import math
import random
from collections.abc import Callable

import pytest

from relufy.train.diagnose import diagnose

Change = Callable[[float, dict], None]
"""Spoils a report, given which share of the run is over."""


def run(change: Change | None = None, steps: int = 300, every: int = 1, kind: str = "penalty") -> list[dict]:
    """Return the reports of a run that is well, but for `change`."""
    noise, logs = random.Random(0), []
    for step in range(every, steps + 1, every):
        share = step / steps
        fall = math.exp(-12 * share)
        zeros = 0.63 + (0.27 * min(1.0, share / 0.7) if kind == "penalty" else -0.04 * share)
        log = {
            "step": step,
            "loss": 3.7 + 0.9 * fall + 0.08 * noise.gauss(0, 1),
            "learning_rate": 1e-3 * min(1.0, share / 0.05) * (1 - share),
            "tokens_per_second": 3000 * (1 + 0.1 * noise.gauss(0, 1)),
            "sparsity": {
                "neuron": [zeros + (1 - zeros) * offset for offset in (-0.75, 0.2, 0.1, 0.1, 0.05, -0.3)],
                "q": [0.5 + 0.03 * noise.gauss(0, 1) for _ in range(6)],
            },
            "dead": [0.004, 0.0, 0.0, 0.0, 0.0, 0.01],
            "dead_positions": min(1024 * step, 131_072),
        }
        if kind == "distilled":
            log |= {"kl": 0.3 * fall + 0.05 + 0.005 * noise.gauss(0, 1)}
        else:
            log |= {"cross_entropy": log["loss"]}
        if kind == "penalty":
            log["cross_entropy"] += 0.25 * share
            log |= {"penalty": 1.7 * (1 - zeros), "penalty_strength": 0.006 * math.exp(4 * share)}
            wanted = 1 - 0.37 * (0.1 / 0.37) ** min(1.0, share / 0.7)
            found = wanted + 0.008 * noise.gauss(0, 1)
            log |= {"target_sparsity": 0.9, "wanted_sparsity": wanted, "found_sparsity": found}
        if change is not None:
            change(share, log)
        logs.append(log)
    return logs


@pytest.mark.parametrize("kind", ["penalty", "distilled", "relufied"])
@pytest.mark.parametrize(("steps", "every"), [(300, 1), (20000, 50), (300, 50), (60, 1), (20, 1)])
def test_a_run_that_is_well_has_no_findings(kind: str, steps: int, every: int) -> None:
    logs = run(steps=steps, every=every, kind=kind)
    assert diagnose(logs) == []
    for count in (0, 1, len(logs) // 3, len(logs) // 2):
        assert diagnose(logs[:count]) == []


def test_a_dense_control_with_nothing_to_learn_has_no_findings() -> None:
    def dense(_share: float, log: dict) -> None:
        for name in ("sparsity", "dead", "dead_positions"):
            del log[name]
        log["loss"] = log["cross_entropy"] = 3.7

    assert diagnose(run(dense, kind="relufied")) == []


def layer_stays_dense(_share: float, log: dict) -> None:
    log["sparsity"]["neuron"][3] = 0.41


def neurons_die(share: float, log: dict) -> None:
    log["dead"] = [0.17 * share, 0.03 * share, 0.0, 0.0, 0.0, 0.0]


def loss_rises(share: float, log: dict) -> None:
    log["cross_entropy"] += 1.5 * share


def loss_jumps(share: float, log: dict) -> None:
    log["loss"] += 4.0 if 0.6 < share < 0.605 else 0.0


def no_number(share: float, log: dict) -> None:
    log["loss"] = math.nan if share > 0.99 else log["loss"]


def no_number_in_json(share: float, log: dict) -> None:
    log["loss"] = None if share > 0.99 else log["loss"]


def target_missed(_share: float, log: dict) -> None:
    log["found_sparsity"] = min(log["found_sparsity"], 0.84)


def strength_at_its_limit(share: float, log: dict) -> None:
    target_missed(share, log)
    log["penalty_strength"] = 0.006 * math.exp(min(9.0, 20 * share))


def target_passed(_share: float, log: dict) -> None:
    log["found_sparsity"] = max(log["found_sparsity"], 0.95)


def zeros_are_lost(share: float, log: dict) -> None:
    log["sparsity"]["q"] = [zeros - 0.2 * share for zeros in log["sparsity"]["q"]]


def slows_down(share: float, log: dict) -> None:
    log["tokens_per_second"] /= 4 if share > 0.9 else 1


@pytest.mark.parametrize(
    ("change", "said", "advice"),
    [
        (layer_stays_dense, "layer 3 is not getting sparse: 41% zeros after 300 steps", "higher target"),
        (neurons_die, "17% of the neurons of layer 0 are dead (and over 2% of layer 1)", "helu"),
        (loss_rises, "the cross-entropy rises", "lower target"),
        (loss_jumps, "the loss jumps at step 181", "learning_rate"),
        (no_number, "the loss is no number at step 298", "learning_rate"),
        (no_number_in_json, "the loss is no number at step 298", "learning_rate"),
        (target_missed, "84.0% zeros, wanted 90.0% (it had too few steps)", "longer last stage"),
        (strength_at_its_limit, "its strength is at its limit", "lower target"),
        (target_passed, "sparser than wanted: 95.0% zeros", "higher target"),
        (zeros_are_lost, "the inputs of q lose their zeros: 49% at the start, 31% now", "learning_rate"),
        (slows_down, "tokens/s", "machine"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_wrong_is_said_with_what_to_try(change: Change, said: str, advice: str) -> None:
    (finding,) = diagnose(run(change))
    assert said in finding and advice in finding.partition("; ")[2]
    assert "\n" not in finding


@pytest.mark.parametrize(
    ("kind", "name", "value"), [("distilled", "kl", 0.4), ("relufied", "cross_entropy", 8.2)]
)
def test_a_learning_rate_that_is_too_low(kind: str, name: str, value: float) -> None:
    (finding,) = diagnose(run(lambda _share, log: log.update({name: value}), kind=kind))
    assert "hardly fallen in 300 steps" in finding and "higher learning_rate than 0.0009" in finding


def test_rare_neurons_are_not_called_dead_too_early() -> None:
    def few_positions(share: float, log: dict) -> None:
        neurons_die(share, log)
        log["dead_positions"] = 4096

    assert diagnose(run(few_positions)) == []


def test_reports_of_any_kind_are_read() -> None:
    assert diagnose([{"step": step} for step in range(1, 400)]) == []
