"""Check 5: how perplexity grows with the share of neurons left out, beside a control; and where the knee is.

At every token the neurons of the least |a_i| ||W_down[:, i]|| are left out: an oracle, the best that a
threshold or a predictor can come to. Beside it as many drawn at random, and the same sweep of a control: the
ReLU or relufied model of the same size. The knee is the greatest share that costs 1 % of perplexity at most.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from relufy.doctor.finding import Finding, percent, rise
from relufy.doctor.patient import Patient
from relufy.measure.modes import WindowLosses, window_losses
from relufy.methods.controls import put_controls
from relufy.model.trial import trial_masks

ALLOWED = 0.01
"""The rise of perplexity at the knee."""
LOOSE = 0.05
GOOD, POOR = 0.8, 0.5


def check(patient: Patient, control: Patient | None = None) -> Finding:
    """Return the rise of perplexity over the share of neurons left out: model, random masks, control."""
    levels = patient.effort.levels
    own = _sweep(patient, levels, "oracle")
    figures: dict[str, Any] = {
        "levels": list(levels),
        "perplexity": patient.losses.perplexity().perplexity,
        "rise": own,
        "rise_of_random": _sweep(patient, levels, "random"),
        "knee": knee(levels, own, ALLOWED),
        "knee_at_5_percent": knee(levels, own, LOOSE),
        "own_zeros": patient.zeros.intrinsic_zero_fraction,
    }
    if control is not None:
        other = _sweep(control, levels, "oracle")
        figures["control"] = {
            "model": control.name,
            "perplexity": control.losses.perplexity().perplexity,
            "rise": other,
            "knee": knee(levels, other, ALLOWED),
            "own_zeros": control.zeros.intrinsic_zero_fraction,
        }
    found = figures["knee"]
    status = "good" if found >= GOOD else "watch" if found >= POOR else "bad"
    return Finding(
        "sweep", "Sparsity and quality", status, _verdict(figures), figures, _advice(patient, figures)
    )  # type: ignore[arg-type]


def _sweep(patient: Patient, levels: Sequence[float], kind: str) -> list[float]:
    """Return the rise of perplexity, as a share of it, at each level."""
    found = []
    for done, level in enumerate(levels):
        patient.progress(f"sweep, {kind}", done, len(levels))
        found.append(rise(patient.nats(masked_losses(patient, level, kind))[0]))
    patient.progress(f"sweep, {kind}", len(levels), len(levels))
    return found


def masked_losses(patient: Patient, level: float, kind: str = "oracle") -> WindowLosses:
    """Return the losses on the test windows with a share of the neurons left out."""
    shares = {(block.index, "down"): level for block in patient.blocks}
    with trial_masks(patient.blocks) as trial:
        put_controls(kind, trial, patient.blocks, shares, patient.scored, patient.effort.seed)
        return window_losses(patient.model, patient.test, patient.scored, patient.effort.batch_size)


def knee(levels: Sequence[float], rises: Sequence[float], allowed: float) -> float:
    """Return the greatest share whose rise is allowed, straight between levels and from (0, 0)."""
    shares, values = np.array([0.0, *levels]), np.array([0.0, *rises])
    beyond = np.flatnonzero(~(values <= allowed))
    if not len(beyond):
        return float(shares[-1])
    last = beyond[0]
    step = (allowed - values[last - 1]) / (values[last] - values[last - 1])
    return float(shares[last - 1] + step * (shares[last] - shares[last - 1]))


def _verdict(figures: dict[str, Any]) -> str:
    words = (
        f"{percent(figures['knee'], 0)} of the neurons can be left out of each token for "
        f"{percent(ALLOWED, 0)} of perplexity, {percent(figures['knee_at_5_percent'], 0)} for "
        f"{percent(LOOSE, 0)}, if one knows which; the model's own zeros are {percent(figures['own_zeros'])}"
    )
    if control := figures.get("control"):
        words += f"; the control {control['model']} has its knee at {percent(control['knee'], 0)}"
    return f"{words}."


def _advice(patient: Patient, figures: dict[str, Any]) -> tuple[str, ...]:
    lines = []
    if "control" not in figures:
        lines.append("a control tells whether the activation or the size is the limit: --control RELU_MODEL")
    elif figures["control"]["knee"] > figures["knee"] + 0.05:
        lines.append("the control's knee is further out: the activation is the limit, so relufy the model")
    if figures["knee"] - figures["own_zeros"] > 0.1:
        lines.append(
            f"the knee lies beyond the model's own zeros: relufy sparsify {patient.name} -o thin "
            "--recipe cats --calibration TEXT takes some of it without training"
        )
    return tuple(lines)
