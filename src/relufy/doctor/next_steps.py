"""From what was found to the commands to run next, the most promising first."""

from collections.abc import Sequence

from relufy.doctor.expectation import Expectation
from relufy.doctor.finding import Finding
from relufy.doctor.patient import Patient

AFFORDABLE = 0.02
"""The rise of perplexity up to which a training-free method is worth its first try."""
MANY = 0.5


def next_steps(patient: Patient, found: Sequence[Finding], rows: Sequence[Expectation]) -> tuple[str, ...]:
    """Return commands with the reason behind a #, in the order to run them."""
    steps = [_free(rows), _trained(patient, rows), *_particular(found)]
    if patient.zeros.gate_only_sparsity >= MANY:
        steps.insert(
            0, f"relufy bench decode --model {patient.name} --against none  # its zeros as speed, here"
        )
    steps.append(
        f"relufy compare {patient.name} --text TEST --calibration OTHER  # all training-free methods, alike"
    )
    return tuple(dict.fromkeys(step for step in steps if step))


def _free(rows: Sequence[Expectation]) -> str:
    """Return the training-free method that saves most within what is affordable."""
    tried = [
        row for row in rows if row.perplexity_rise is not None and row.command and row.method != "as it is"
    ]
    within = [row for row in tried if (row.perplexity_rise or 0.0) <= AFFORDABLE]
    if not within:
        return ""
    best = max(within, key=lambda row: row.weights_unread)
    cost = f"{100 * (best.perplexity_rise or 0.0):+.1f} % perplexity"
    return (
        f"{best.command}  # no training: {100 * best.weights_unread:.0f} % of the weights unread, {cost} here"
    )


def _trained(patient: Patient, rows: Sequence[Expectation]) -> str:
    """Return the fine-tune of the most zeros that this model's own distribution promises."""
    if patient.zeros.gate_only_sparsity >= MANY:
        return ""
    trained = [row for row in rows if row.method == "stage 1"]
    more = [row for row in rows if row.method.startswith("ProSparse")]
    for row in (*more, *trained):
        zeros = 100 * (row.neuron_zeros or 0.0)
        saved = 100 * row.weights_unread
        return f"{row.command}  # with training: {zeros:.0f} % zeros, {saved:.0f} % of the weights unread"
    return ""


def _particular(found: Sequence[Finding]) -> list[str]:
    """Return the commands that single checks advise where something is wrong."""
    lines = [line for finding in found if finding.status == "bad" for line in finding.advice]
    return [line[line.index("relufy ") :] for line in lines if "relufy sparsify" in line]
