"""What is wrong with a run, from its reports alone, and what to try.

Every finding is one line. A healthy run has none: short runs are not judged, and each threshold lies beyond
what our own good runs show. Two to three times the density of the other layers in the first, a slow rise of
the cross-entropy while a penalty grows, and the flat loss of a dense control are such things.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from relufy.train.controller import RANGE

Logs = Sequence[Mapping[str, Any]]

LEAST_REPORTS = 4
LEAST_STEPS = 50
"""Before a trend is judged."""
DEAD_SHARE = 0.02
DEAD_POSITIONS = 16_384
"""With fewer watched positions rare neurons look dead."""


def diagnose(logs: Logs) -> list[str]:
    """Return what is wrong with the run that reported `logs`, in the order of steps; nothing for most."""
    if len(logs) < LEAST_REPORTS or logs[-1]["step"] - logs[0]["step"] < LEAST_STEPS:
        return []
    checks = (_not_finite, _spikes, _rising, _flat, _dense_layers, _dead, _lost_zeros, _target, _slower)
    return [finding for check in checks for finding in check(logs)]


def _not_finite(logs: Logs) -> Iterator[str]:
    steps = [log["step"] for log in logs if "loss" in log and not _is_number(log["loss"])]
    if steps:
        yield f"the loss is no number at step {steps[0]}; try a lower learning_rate or more warmup_steps"


def _spikes(logs: Logs) -> Iterator[str]:
    """A report whose loss is far above those just before it; the first fifth, with the warm-up, is not."""
    steps, losses = _series(logs, "loss")
    spikes = []
    for i in range(max(8, len(losses) // 5), len(losses)):
        before = losses[i - 8 : i]
        usual, spread = median(before), max(before) - min(before)
        if losses[i] > usual + max(3 * spread, 0.3 * usual):
            spikes.append((steps[i], usual, losses[i]))
    if spikes:
        step, usual, height = max(spikes, key=lambda spike: spike[2] / spike[1])
        others = f", and {len(spikes) - 1} more times" if len(spikes) > 1 else ""
        yield (
            f"the loss jumps at step {step} from {usual:.3g} to {height:.3g}{others}; try a lower "
            "learning_rate or more warmup_steps"
        )


def _rising(logs: Logs) -> Iterator[str]:
    """What is learnt gets worse for long. A growing penalty may cost something, up to a sixth."""
    name = _learnt(logs)
    steps, values = _series(logs, name)
    if len(values) < 2 * LEAST_REPORTS or (name != "cross_entropy" and _has_penalty(logs)):
        return
    part = max(2, len(values) // 10)
    means = [fmean(values[i : i + part]) for i in range(0, len(values) - part + 1, part)]
    best = min(range(len(means)), key=means.__getitem__)
    allowed = 1.16 if _has_penalty(logs) else 1.04
    if len(means) - best > 2 and means[-1] > allowed * means[best] and means[-2] > allowed * means[best]:
        advice = "a lower target or a slower penalty" if _has_penalty(logs) else "a lower learning_rate"
        yield (
            f"{_words(name)} rises: {means[best]:.3g} around step {steps[best * part]}, {means[-1]:.3g} now; "
            f"try {advice}"
        )


def _flat(logs: Logs) -> Iterator[str]:
    """Nothing is learnt although there is much to learn: a KL to a teacher, or a new model."""
    name = _learnt(logs)
    _, values = _series(logs, name)
    if name == "loss" or len(values) < LEAST_REPORTS or _has_penalty(logs):
        return
    part = max(1, len(values) // 10)
    first, last = fmean(values[:part]), fmean(values[-2 * part :])
    has_much = first > 0.05 if name == "kl" else first > 6
    if has_much and 0.97 * first < last < 1.04 * first:
        step, rate = logs[-1]["step"], max(_series(logs, "learning_rate")[1], default=math.nan)
        yield (
            f"{_words(name)} has hardly fallen in {step} steps: {first:.3g} to {last:.3g}; try a higher "
            f"learning_rate than {rate:.2g}"
        )


def _dense_layers(logs: Logs) -> Iterator[str]:
    """A layer with far fewer zeros than the others, and no more than before."""
    layers = _layers(logs, "neuron")
    if len(layers) < LEAST_REPORTS or len(layers[-1]) < 3:
        return
    now, before = _mean_layers(_last(layers)), _mean_layers(_middle(layers))
    for layer, zeros in enumerate(now):
        others = median(now[:layer] + now[layer + 1 :])
        is_behind = others - zeros > 0.25 and 1 - zeros > 2.5 * (1 - others)
        if is_behind and zeros - before[layer] < 0.02:
            yield (
                f"layer {layer} is not getting sparse: {zeros:.0%} zeros after {logs[-1]['step']} steps, the "
                f"others {others:.0%}; try a shifted ReLU, or a penalty with a higher target"
            )


def _dead(logs: Logs) -> Iterator[str]:
    reports = [log for log in logs if log.get("dead") and log.get("dead_positions", 0) >= DEAD_POSITIONS]
    if not reports:
        return
    dead, positions = reports[-1]["dead"], reports[-1]["dead_positions"]
    many = [layer for layer, share in enumerate(dead) if share > DEAD_SHARE]
    if many:
        worst = max(many, key=dead.__getitem__)
        others = [layer for layer in many if layer != worst]
        more = f" (and over {DEAD_SHARE:.0%} of {_layer_list(others)})" if others else ""
        yield (
            f"{dead[worst]:.0%} of the neurons of layer {worst} are dead{more}, active at none of "
            f"{positions} positions; try helu, a lower learning_rate, or a later penalty"
        )


def _lost_zeros(logs: Logs) -> Iterator[str]:
    """A site that had zeros and loses them; neurons lose some while the quality comes back."""
    for site in _sites(logs):
        layers = _layers(logs, site)
        if len(layers) < LEAST_REPORTS:
            continue
        had, has = fmean(_mean_layers(layers[: _part(layers)])), fmean(_mean_layers(_last(layers)))
        if had - has > (0.2 if site == "neuron" else 0.1):
            what = "the neurons" if site == "neuron" else f"the inputs of {site}"
            advice = "a penalty" if site == "neuron" else "a lower learning_rate, or fewer steps"
            yield f"{what} lose their zeros: {had:.0%} at the start, {has:.0%} now; try {advice}"


def _target(logs: Logs) -> Iterator[str]:
    """Where the way to a target has ended: how far from it the zeros are."""
    reports = [log for log in logs if "target_sparsity" in log]
    if not reports or abs(reports[-1]["wanted_sparsity"] - reports[-1]["target_sparsity"]) > 1e-3:
        return
    last = reports[-max(1, len(reports) // 20) :]
    target, found = last[-1]["target_sparsity"], fmean(log["found_sparsity"] for log in last)
    least = max(0.02, 0.2 * (1 - target))
    if target - found > least:
        limit = "its strength is at its limit" if _is_at_limit(logs) else "it had too few steps"
        yield (
            f"the penalty has not reached its target: {found:.1%} zeros, wanted {target:.1%} ({limit}); try "
            "a longer last stage, a higher learning_rate, or a lower target"
        )
    elif found - target > least:
        yield (
            f"the neurons are sparser than wanted: {found:.1%} zeros, wanted {target:.1%}; try a "
            "higher target, or a longer last stage"
        )


def _slower(logs: Logs) -> Iterator[str]:
    steps, speeds = _series(logs, "tokens_per_second")
    if len(speeds) < 2 * LEAST_REPORTS:
        return
    usual, now = median(speeds), median(speeds[-3:])
    if now < 0.5 * usual:
        yield (
            f"training slowed down from {usual:.0f} to {now:.0f} tokens/s by step {steps[-1]}; look for "
            "other work on this machine, swapping, or a slow source of text"
        )


def _is_at_limit(logs: Logs) -> bool:
    strengths = [value for value in _series(logs, "penalty_strength")[1] if value > 0]
    return bool(strengths) and math.log(strengths[-1] / strengths[0]) > RANGE[1] - 1


def _has_penalty(logs: Logs) -> bool:
    return any(value > 0 for value in _series(logs, "penalty_strength")[1])


def _learnt(logs: Logs) -> str:
    """Return the term that shows the quality."""
    return next((name for name in ("kl", "cross_entropy") if name in logs[-1]), "loss")


def _words(name: str) -> str:
    return {"kl": "the KL to the teacher", "cross_entropy": "the cross-entropy"}.get(name, "the loss")


def _layer_list(layers: Sequence[int]) -> str:
    if len(layers) > 4:
        return f"{len(layers)} other layers"
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _series(logs: Logs, name: str) -> tuple[list[int], list[float]]:
    """Return the steps and the values of the reports that have a number of this name."""
    found = [(log["step"], log[name]) for log in logs if _is_number(log.get(name))]
    return [step for step, _ in found], [value for _, value in found]


def _sites(logs: Logs) -> list[str]:
    return list(dict.fromkeys(site for log in logs for site in log.get("sparsity", {})))


def _layers(logs: Logs, site: str) -> list[list[float]]:
    """Return the zeros of a site by layer, one list for each report that has them."""
    return [list(log["sparsity"][site]) for log in logs if site in log.get("sparsity", {})]


def _part(rows: Sequence[Any]) -> int:
    return max(1, len(rows) // 10)


def _last(rows: Sequence[list[float]]) -> Sequence[list[float]]:
    return rows[-_part(rows) :]


def _middle(rows: Sequence[list[float]]) -> Sequence[list[float]]:
    middle = len(rows) // 2
    return rows[max(0, middle - _part(rows)) : middle + 1]


def _mean_layers(rows: Sequence[list[float]]) -> list[float]:
    return [fmean(layer) for layer in zip(*rows, strict=True)]
