"""Check 3: leaving out heads that know (oracle), that guess from the input (predicted), and at random.

All three keep the same number of heads at every token of every layer (arXiv 2405.09274, section 5). What the
oracle costs is the price of the heads; what the predictor costs beyond it is the price of not knowing.
"""

from typing import Any

import torch

from relufy.doctor.finding import Finding, percent, signed
from relufy.doctor.head_masks import Choices, Heads, num_kept
from relufy.doctor.head_predictor import fit_head_predictor
from relufy.doctor.patient import Patient
from relufy.errors import UserError

CHEAP, DEAR = 0.01, 0.05
"""Nats a token."""


def check(patient: Patient) -> Finding:
    """Return what it costs to skip heads chosen in three ways. Raises UserError without heads to skip."""
    heads = Heads(patient.model.config, patient.blocks)
    kept, count = num_kept(heads.count[0]), heads.count[0]
    figures: dict[str, Any] = {"heads": count, "kept": kept, "skipped_share": 1 - kept / count}
    with heads.choosing(heads.importance):
        figures["oracle"] = _cost(patient)
    generator = torch.Generator().manual_seed(patient.effort.seed)
    with heads.choosing(lambda layer, x: _drawn(x, heads.count[layer], generator)):
        figures["random"] = _cost(patient)
    figures |= _predicted(patient, heads)
    return Finding("heads", "Skipping heads", _status(figures), _verdict(figures), figures, _advice(figures))


def _cost(patient: Patient) -> dict[str, float]:
    nats, error = patient.nats(patient.run())
    return {"nats_more": nats, "standard_error": error}


def _predicted(patient: Patient, heads: Heads) -> dict[str, Any]:
    """Return the predictor's cost and its recall of the oracle's heads, or why there is none."""
    try:
        predictor = fit_head_predictor(patient, heads)
    except UserError as error:
        return {"predicted": None, "predicted_reason": str(error)}
    seen: Choices = {}
    hits, total = 0.0, 0.0

    def score(layer: int, x: torch.Tensor) -> torch.Tensor:
        nonlocal hits, total
        scores = predictor.score(layer, x)
        true = heads.kept(layer, heads.importance(layer, x))
        hits += float((true & heads.kept(layer, scores)).sum())
        total += float(true.sum())
        return scores

    with predictor.attached(patient), heads.choosing(score, seen):
        return {"predicted": _cost(patient), "predictor_recall": hits / total}


def _drawn(x: torch.Tensor, heads: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand((*x.shape[:-1], heads), generator=generator).to(x.device)


def _status(figures: dict[str, Any]) -> Any:
    oracle = figures["oracle"]["nats_more"]
    predicted = figures["predicted"]["nats_more"] if figures["predicted"] else oracle
    return "good" if predicted < CHEAP else "watch" if oracle < DEAR else "bad"


def _verdict(figures: dict[str, Any]) -> str:
    share = percent(figures["skipped_share"], 0)
    words = (
        f"Keeping {figures['kept']} of {figures['heads']} heads at every token (skipping {share}): the ones "
        f"that matter {signed(figures['oracle']['nats_more'])}, heads drawn at random "
        f"{signed(figures['random']['nats_more'])}"
    )
    if figures["predicted"]:
        words += (
            f", chosen by a linear predictor {signed(figures['predicted']['nats_more'])} (it finds "
            f"{percent(figures['predictor_recall'])} of the right ones)"
        )
    return f"{words}."


def _advice(figures: dict[str, Any]) -> tuple[str, ...]:
    oracle = figures["oracle"]["nats_more"]
    if oracle >= DEAR:
        return ("this model needs its heads: sparsify the inputs of q k v o instead (teal, wina, larosa)",)
    if figures["predicted"] and figures["predicted"]["nats_more"] >= max(DEAR, 3 * oracle):
        return ("heads could be skipped, but a linear predictor does not find them: train a stronger one",)
    return ("heads can be skipped by choice; the engine skips inputs of o, so masks there (teal) do it",)
