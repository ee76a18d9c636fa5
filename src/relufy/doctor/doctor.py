"""`relufy doctor`: seven checks of a model (after arXiv 2405.09274), what methods may give, what is next."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from relufy.doctor import (
    activation,
    first_tokens,
    generation,
    heads,
    keys_and_values,
    layers,
    prediction,
    sweep,
)
from relufy.doctor.expectation import Expectation
from relufy.doctor.expectations import expectations
from relufy.doctor.finding import Finding
from relufy.doctor.next_steps import next_steps
from relufy.doctor.patient import FULL, Effort, Patient, Progress, admit
from relufy.document import heading
from relufy.errors import UserError
from relufy.measure.quality import refuse_other_vocabulary
from relufy.schema import finite

DEFINITIONS = {
    "nats_more": "mean loss minus that of the same model without the masks that are tried, nats a token, "
    "with its standard error, paired by window",
    "rise": "the same as a share of the perplexity: exp(nats_more) - 1",
    "CETT": "norm of what the left-out neurons would have added over that of all of them, a mean over "
    "tokens (ReLU2 Wins, arXiv 2402.03804)",
    "universal epsilon": "the one norm ||a_i W_down[:, i]|| below which neurons of all layers are left out "
    "so that the mean CETT over layers is the target",
    "dead_share": "share of a layer's neurons without any output at every token of the text; idle: below the "
    "layer's own epsilon at every token",
    "knee": "greatest share of neurons, the least by |a_i| ||W_down[:, i]||, whose removal costs 1 % of "
    "perplexity at most; an oracle",
    "weights_unread": "share of the blocks' linear weights that zeros leave unread (model_level_sparsity)",
    "bytes_saved": "share of bytes_engine, what the CPU engine reads for a token: f32, half a window of "
    "context",
    "neuron_zeros": "share of exact zeros in the activation's output (gate_only_sparsity)",
}
PASSES = 40
"""About how many times all checks but the sweep run the test windows, generation included."""
UNFIT = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, NotImplementedError)
"""What an architecture that a check does not fit raises."""


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor found, in the order of the checks."""

    model: str
    architecture: str
    activation: str
    control: str | None
    windows: int
    window: int
    perplexity: float
    findings: tuple[Finding, ...]
    expectations: tuple[Expectation, ...]
    next_steps: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float
    settings: dict[str, Any]

    def finding(self, check: str) -> Finding:
        """Return the finding of a check."""
        return next(found for found in self.findings if found.check == check)

    def to_json(self) -> dict[str, Any]:
        """Return the document; what is no number is None."""
        own = {name: value for name, value in vars(self).items() if name not in ("findings", "expectations")}
        found = [finding.to_json() for finding in self.findings]
        rows = [row.to_json() for row in self.expectations]
        document = {**own, "findings": found, "expectations": rows, "definitions": DEFINITIONS}
        return finite({**heading("relufy.doctor"), **document})


def diagnose(
    model: str | Path,
    text: Sequence[str | Path] | str | Path,
    control: str | Path | None = None,
    effort: Effort = FULL,
    progress: Progress = lambda task, done, total: None,
    on_note: Callable[[str], object] = lambda note: None,
) -> Diagnosis:
    """Examine a checkpoint on text files. Raises UserError for unfit input.

    `control` is the ReLU or relufied model of the same size that the sweep is compared with. What cannot be
    checked on the architecture is a finding "unchecked" with the reason. `on_note` is told how long it will
    take, once that can be told.
    """
    started = time.monotonic()
    files = [text] if isinstance(text, str | Path) else list(text)
    patient = admit(model, files, effort, progress)
    other = _admit_control(control, files, patient) if control is not None else None
    on_note(_forecast(patient, other is not None))
    found = _run_checks(patient, other)
    rows, notes = _expected(patient)
    return Diagnosis(
        model=str(model),
        architecture=patient.kind,
        activation=patient.activation,
        control=str(control) if control is not None else None,
        windows=len(patient.fit) + len(patient.test),
        window=effort.window,
        perplexity=patient.losses.perplexity().perplexity,
        findings=tuple(found),
        expectations=tuple(rows),
        next_steps=next_steps(patient, found, rows),
        notes=notes,
        seconds=time.monotonic() - started,
        settings=asdict(effort) | {"text": [str(file) for file in files]},
    )


def _forecast(patient: Patient, has_control: bool) -> str:
    """Return about how long the checks will take, from the time of the first pass over the test windows."""
    started = time.monotonic()
    try:
        losses = patient.losses.per_window
    except UNFIT as error:
        raise UserError(f"{patient.kind} does not run on plain windows: {_reason(error)}") from error
    if not np.isfinite(losses).all():
        raise UserError("the model's losses are no numbers (NaN or infinite); check the checkpoint")
    seconds = time.monotonic() - started
    passes = PASSES + (2 + has_control) * len(patient.effort.levels)
    tokens = passes * patient.test.size
    return f"about {max(1, round(seconds * passes)):,} s: {passes} passes over text, {tokens:,} tokens in all"


def _admit_control(control: str | Path, files: list[Any], patient: Patient) -> Patient:
    """Load the control for the very same windows. Raises UserError for another vocabulary."""
    admitted = admit(control, files, patient.effort, patient.progress)
    refuse_other_vocabulary(patient.model, admitted.model)
    return replace(admitted, fit=patient.fit, test=patient.test)


def _run_checks(patient: Patient, control: Patient | None) -> list[Finding]:
    found: list[Finding] = []
    checks = CHECKS
    for done, (name, title, check) in enumerate(checks):
        patient.progress("checks", done, len(checks))
        started = time.monotonic()
        finding = _guarded(name, title, patient, lambda check=check: check(patient, control, found))
        found.append(replace(finding, seconds=time.monotonic() - started))
    patient.progress("checks", len(checks), len(checks))
    return found


def _guarded(name: str, title: str, patient: Patient, check: Callable[[], Finding]) -> Finding:
    """Return a check's finding, or the reason why this architecture does not allow it."""
    try:
        return check()
    except UserError as error:
        return Finding(name, title, "unchecked", f"Not checked: {error}.")
    except UNFIT as error:
        return Finding(name, title, "unchecked", f"Not checked on {patient.kind}: {_reason(error)}")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _expected(patient: Patient) -> tuple[list[Expectation], tuple[str, ...]]:
    """Return the table of expectations, or why this architecture has none."""
    try:
        return expectations(patient), ()
    except UNFIT as error:
        return [], (f"what to expect cannot be told on {patient.kind}: {_reason(error)}",)


def _generation(patient: Patient, _control: Patient | None, found: list[Finding]) -> Finding:
    swept = next((finding.figures for finding in found if finding.check == "sweep"), {})
    return generation.check(patient, generation.level_for(dict(swept)) if swept else 0.5)


CHECKS: tuple[tuple[str, str, Callable[[Patient, Patient | None, list[Finding]], Finding]], ...] = (
    ("activation", "The activation", lambda patient, control, found: activation.check(patient)),
    ("layers", "Balance of the layers", lambda patient, control, found: layers.check(patient)),
    ("prediction", "Predicting neurons", lambda patient, control, found: prediction.check(patient)),
    ("heads", "Skipping heads", lambda patient, control, found: heads.check(patient)),
    ("keys_and_values", "Keys and values", lambda patient, control, found: keys_and_values.check(patient)),
    ("sweep", "Sparsity and quality", lambda patient, control, found: sweep.check(patient, control)),
    ("generation", "Writing by itself", _generation),
    ("first_tokens", "The first tokens", lambda patient, control, found: first_tokens.check(patient)),
)
"""Name, title, and the check, which may look at what was found before."""
