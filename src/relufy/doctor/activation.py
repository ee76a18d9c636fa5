"""Check: which activation the MLP has, what zeros it makes, and what a ReLU in its place would make.

`relu(z - b)` is zero where z <= b, so the sparsity after a swap is the share of the model's pre-activations
at or below b (ReLU Strikes Back, arXiv 2310.04564, section 5.1: a fine-tune barely moves them).
"""

from relufy.doctor.finding import Finding, percent
from relufy.doctor.patient import Patient

MANY = 0.5
"""A share of zeros from which skipping pays on the engine."""
WANTED = 0.9


def check(patient: Patient) -> Finding:
    """Return what zeros there are and what a ReLU would make of this model's pre-activations."""
    found, zeros = patient.preactivations, patient.zeros
    predicted, shift = found.mean_sparsity(), found.shift_for(WANTED)
    figures = {
        "activation": patient.activation,
        "gate_only_sparsity": zeros.gate_only_sparsity,
        "intrinsic_zero_fraction": zeros.intrinsic_zero_fraction,
        "model_level_sparsity": zeros.model_level_sparsity,
        "sparsity_by_layer": list(zeros.sites["neuron"]),
        "predicted_relu_sparsity": predicted,
        "predicted_relu_sparsity_by_layer": list(found.sparsity()),
        "shift_for_90": shift,
        "shift_for_90_by_layer": list(found.shifts_for(WANTED)),
    }
    made = zeros.gate_only_sparsity
    if made >= MANY:
        return Finding(
            "activation", "The activation", "good", _sparse(patient, made), figures, _run_it(patient)
        )
    swap = (
        f"{percent(predicted)} of its pre-activations are at or below 0, so a ReLU in its place makes about "
        f"that many zeros; for {percent(WANTED, 0)} its shift is {shift:.3g}"
    )
    word = "no" if made < 0.001 else f"only {percent(made)}"
    verdict = f"{patient.activation} makes {word} exact zeros. {swap}."
    return Finding("activation", "The activation", "bad", verdict, figures, _swap_it(patient, predicted))


def _sparse(patient: Patient, made: float) -> str:
    level = percent(patient.zeros.model_level_sparsity)
    return (
        f"{patient.activation} makes {percent(made)} of the neurons exactly zero, which leaves {level} of "
        "the blocks' weights unread without any further step."
    )


def _run_it(patient: Patient) -> tuple[str, ...]:
    return (f"relufy pack {patient.name} -o model.relufy --dtype int8",)


def _swap_it(patient: Patient, predicted: float) -> tuple[str, ...]:
    """Stage 1 alone where its zeros suffice; a penalty or a shift where they don't."""
    swap = f"relufy finetune {patient.name} -o sparse --recipe relufy-stage1 --data self"
    more = f"relufy finetune {patient.name} -o sparse --recipe prosparse --target 0.9 --data TEXTS"
    return (swap,) if predicted >= WANTED else (swap, more)
