"""Check 1: how evenly the layers could be sparse (Dynamic Activation Pitfalls, arXiv 2405.09274, section 4).

One epsilon for all layers at a mean CETT of 0.2 empties some layers and leaves others full (the paper: 99 %
in Llama-3-8B's first layer, little more than 10 % in its last); an epsilon for each layer at that CETT shows
what they can really do without. Layers of dead neurons are told apart from sparse ones.
"""

from collections.abc import Sequence

import numpy as np

from relufy.doctor.finding import Finding, listed, percent
from relufy.doctor.idle import Idle, idle_neurons
from relufy.doctor.patient import Patient
from relufy.measure.cett import CETT_TARGET, CettSparsity, cett_at, cett_sparsity

CETT_TOKENS = 1024
"""Positions that the nested search looks at."""
ROUNDS, SECTIONS = 2, 12
UNEVEN = 0.3
"""A spread of the layers' shares from which one threshold for all of them is a mistake."""
DEAD = 0.5
"""A share of dead neurons from which a layer is called dead."""


def check(patient: Patient) -> Finding:
    """Return the layers' shares at one epsilon, at one each, and their dead neurons."""
    windows = patient.test[: max(1, CETT_TOKENS // patient.test.shape[1])]
    own = cett_sparsity(patient.model, windows, "all", CETT_TARGET, patient.effort.batch_size)
    epsilon, universal, errors = _universal(patient, windows, own)
    idle = idle_neurons(patient, own.epsilon)
    spread = max(universal) - min(universal)
    figures = {
        "cett_target": CETT_TARGET,
        "universal_epsilon": epsilon,
        "sparsity_at_universal_epsilon": universal,
        "cett_at_universal_epsilon": errors,
        "epsilon_by_layer": list(own.epsilon),
        "sparsity_at_equal_cett": list(own.sparsity),
        "dead_share": list(idle.dead),
        "idle_share": list(idle.idle),
        "spread_at_universal_epsilon": spread,
        "spread_at_equal_cett": max(own.sparsity) - min(own.sparsity),
    }
    dead = [layer for layer, share in enumerate(idle.dead) if share >= DEAD]
    status = "bad" if dead else "watch" if spread > UNEVEN else "good"
    verdict = _verdict(universal, own, idle, dead)
    return Finding(
        "layers", "Balance of the layers", status, verdict, figures, _advice(patient, dead, spread)
    )


def _universal(
    patient: Patient, windows: np.ndarray, own: CettSparsity
) -> tuple[float, list[float], list[float]]:
    """Return the one epsilon whose error, a mean over layers, is the target; the shares and errors there."""
    positive = [epsilon for epsilon in own.epsilon if epsilon > 0]
    if not positive:
        return 0.0, list(own.sparsity), list(own.error)
    low, high = min(positive), max(positive)
    for _ in range(ROUNDS):
        tried = np.geomspace(low, high * 1.0001, SECTIONS).tolist()
        errors, shares = cett_at(patient.model, windows, tried, "all", patient.effort.batch_size)
        within = np.flatnonzero(errors.mean(0) <= own.target)
        best = int(within[-1]) if len(within) else 0
        low, high = tried[best], tried[min(best + 1, SECTIONS - 1)]
    return tried[best], shares[:, best].tolist(), errors[:, best].tolist()


def _verdict(universal: Sequence[float], own: CettSparsity, idle: Idle, dead: list[int]) -> str:
    most, least = int(np.argmax(universal)), int(np.argmin(universal))
    words = [
        f"At an error of {own.target:g} (CETT) the layers could do without {percent(own.mean)} of their "
        f"neurons with an epsilon each ({percent(min(own.sparsity))} to {percent(max(own.sparsity))}); one "
        f"epsilon for all gives {percent(universal[most])} in layer {most} and {percent(universal[least])} "
        f"in layer {least}."
    ]
    if dead:
        shares = ", ".join(percent(idle.dead[layer], 0) for layer in dead[:6])
        verb = "are" if len(dead) > 1 else "is"
        words.append(
            f"{listed(dead).capitalize()} {verb} dead: {shares} of the neurons never fire on this text."
        )
    if max(idle.idle) > 0.05 and not dead:
        layer = int(np.argmax(idle.idle))
        words.append(f"Layer {layer} never needs {percent(idle.idle[layer])} of its neurons on this text.")
    return " ".join(words)


def _advice(patient: Patient, dead: list[int], spread: float) -> tuple[str, ...]:
    lines = []
    if dead:
        lines.append(
            f"{listed(dead)}: dead neurons cost memory and skew every mean; revive them with a recipe's HeLU "
            "(relufy-helu) or leave these layers out of a report's mean"
        )
    if spread > UNEVEN:
        lines.append(
            "thresholds by layer, not one for all: "
            f"relufy sparsify {patient.name} -o thin --recipe teal --calibration TEXT"
        )
    return tuple(lines)
