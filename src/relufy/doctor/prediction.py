"""Check 2: can it be predicted which neurons a token needs (arXiv 2405.09274, causes 1 and 2)?

Three masks keep as many neurons of each token: those that matter most (oracle), those that a low-rank linear
predictor names, and drawn ones. What the oracle costs is a lack of sparsity; what the predictor costs beyond
it is a lack of knowledge.
"""

from typing import Any

from relufy.doctor.finding import Finding, percent, signed
from relufy.doctor.neuron_predictor import NeuronPredictor, fit_neuron_predictors, predicted_masks
from relufy.doctor.patient import Patient
from relufy.doctor.sweep import masked_losses
from relufy.model.configuration import sparsity_of

LEAST_LEFT_OUT, MOST_LEFT_OUT = 0.5, 0.95
RANK_SHARE = 0.25
"""The predictor's rank, as a share of the model's width."""
CHEAP, DEAR = 0.02, 0.1
"""Nats a token."""


def check(patient: Patient) -> Finding:
    """Return recall, precision and perplexity of predicted neurons beside an oracle's and drawn ones.

    As many are left out as the model has zeros by itself, but half at least. Raises UserError where the fit
    takes too much memory.
    """
    hidden, neurons = patient.blocks[0].up.shape[1], patient.blocks[0].down.shape[1]
    left_out = min(MOST_LEFT_OUT, max(LEAST_LEFT_OUT, patient.zeros.intrinsic_zero_fraction))
    kept, rank = max(1, int((1 - left_out) * neurons)), max(1, round(RANK_SHARE * hidden))
    layers = fit_neuron_predictors(patient, kept, rank)
    with predicted_masks(patient, layers):
        predicted = _cost(patient, patient.run())
    oracle, drawn = (
        _cost(patient, masked_losses(patient, 1 - kept / neurons, k)) for k in ("oracle", "random")
    )
    figures: dict[str, Any] = {
        "left_out": 1 - kept / neurons,
        "rank": rank,
        "recall": [_share(layer, "wanted") for layer in layers],
        "precision": [_share(layer, "chosen") for layer in layers],
        "predicted_sparsity": [1 - kept / neurons for _ in layers],
        "oracle": oracle,
        "predicted": predicted,
        "random": drawn,
    }
    beyond = predicted["nats_more"] - oracle["nats_more"]
    figures["cost_of_not_knowing"] = beyond
    status = "good" if predicted["nats_more"] < CHEAP else "watch" if predicted["nats_more"] < DEAR else "bad"
    advice = _advice(patient, oracle["nats_more"], beyond)
    return Finding("prediction", "Predicting neurons", status, _verdict(figures), figures, advice)  # type: ignore[arg-type]


def _cost(patient: Patient, losses: Any) -> dict[str, float]:
    nats, error = patient.nats(losses)
    return {"nats_more": nats, "standard_error": error}


def _share(layer: NeuronPredictor, of: str) -> float:
    """Return the hits as a share of the wanted or of the chosen neurons."""
    total = getattr(layer.overlap, of)
    return layer.overlap.hits / total if total else 1.0


def _verdict(figures: dict[str, Any]) -> str:
    recall = figures["recall"]
    worst = min(range(len(recall)), key=recall.__getitem__)
    return (
        f"With {percent(figures['left_out'], 0)} of the neurons left out: the ones that matter least "
        f"{signed(figures['oracle']['nats_more'])}, the ones that a linear predictor of rank "
        f"{figures['rank']} leaves out {signed(figures['predicted']['nats_more'])}, drawn ones "
        f"{signed(figures['random']['nats_more'])}. It finds {percent(sum(recall) / len(recall))} of those "
        f"that matter ({percent(recall[worst])} in layer {worst}); {_cause(figures)}."
    )


def _cause(figures: dict[str, Any]) -> str:
    oracle, beyond = figures["oracle"]["nats_more"], figures["cost_of_not_knowing"]
    if oracle + beyond < CHEAP:
        return "neither sparsity nor prediction limits here"
    return "prediction is the limit" if beyond > oracle else "sparsity is the limit, more than prediction"


def _advice(patient: Patient, oracle: float, beyond: float) -> tuple[str, ...]:
    if sparsity_of(patient.model).at("neuron", 0) is not None:
        return (f"relufy predictor {patient.name} -o predicting --text TEXT knows the gate, too",)
    if beyond > max(oracle, CHEAP):
        return ("methods that look at values (teal, cats) do not need to predict; start with these",)
    return ()
