"""Check 4: what a skipped head costs if its keys and values are not written (arXiv 2405.09274, cause 3).

The same heads are skipped at the same tokens twice: once their keys and values are in the cache all the same,
once later tokens cannot see them. The difference is information that was needed later.
"""

from typing import Any

import torch

from relufy.doctor.finding import Finding, signed
from relufy.doctor.head_masks import Choices, Heads
from relufy.doctor.kv_masks import hidden_keys, honours_masks, written
from relufy.doctor.patient import Patient
from relufy.errors import UserError
from relufy.measure.modes import WindowLosses, window_losses
from relufy.measure.quality import evaluating

CHEAP, DEAR = 0.01, 0.05
"""Nats a token."""


def check(patient: Patient) -> Finding:
    """Return the two costs. Raises UserError where attention takes no mask by head."""
    heads = Heads(patient.model.config, patient.blocks)
    count, groups = heads.count[0], _groups(patient, heads.count[0])
    with evaluating(patient.model):
        ids = torch.from_numpy(patient.test[:1, :16]).to(patient.model.device)
        if not honours_masks(patient.model, patient.blocks, ids, count):
            raise UserError(f"{patient.kind}: its attention does not honour a mask of its own for each head")
    kept, hidden = _both(patient, heads, groups)
    (with_kv, error), (without_kv, other) = patient.nats(kept), patient.nats(hidden)
    difference = hidden.minus(kept)
    figures: dict[str, Any] = {
        "heads": count,
        "key_value_heads": groups,
        "kv_written": {"nats_more": with_kv, "standard_error": error},
        "kv_skipped": {"nats_more": without_kv, "standard_error": other},
        "cost_of_skipping_kv": {"nats_more": difference.mean, "standard_error": difference.standard_error},
    }
    cost = difference.mean
    status = "good" if cost < CHEAP else "watch" if cost < DEAR else "bad"
    verdict = (
        f"The same heads skipped at the same tokens: {signed(with_kv)} with their keys and values still "
        f"written, {signed(without_kv)} with these skipped too. So {_cause(cost)}."
    )
    return Finding("keys_and_values", "Keys and values", status, verdict, figures, _advice(cost))  # type: ignore[arg-type]


def _groups(patient: Patient, heads: int) -> int:
    """Return the number of heads that have keys and values of their own."""
    config = patient.model.config.get_text_config()
    found = getattr(config, "num_key_value_heads", None) or heads
    return found if isinstance(found, int) and heads % found == 0 else heads


def _both(patient: Patient, heads: Heads, groups: int) -> tuple[WindowLosses, WindowLosses]:
    """Return the losses with keys and values written, and with those of skipped heads hidden."""
    runs: list[list[WindowLosses]] = [[], []]
    for start in range(0, len(patient.test), patient.effort.batch_size):
        batch = patient.test[start : start + patient.effort.batch_size]
        chosen: Choices = {}
        with heads.choosing(heads.importance, chosen):
            runs[0].append(window_losses(patient.model, batch, patient.scored, len(batch)))
        by_token = {layer: flags.reshape(len(batch), -1, flags.shape[-1]) for layer, flags in chosen.items()}
        seen = written(by_token, groups)
        with heads.keeping(by_token), hidden_keys(patient.model, patient.blocks, seen):
            runs[1].append(window_losses(patient.model, batch, patient.scored, len(batch)))
    first, second = (_joined(parts) for parts in runs)
    return first, second


def _joined(parts: list[WindowLosses]) -> WindowLosses:
    per_window = tuple(value for part in parts for value in part.per_window)
    return WindowLosses(per_window, sum(part.tokens for part in parts))


def _cause(cost: float) -> str:
    if cost < CHEAP:
        return "later tokens do not miss what the skipped heads would have written"
    return f"{signed(cost)} comes from information that later tokens miss"


def _advice(cost: float) -> tuple[str, ...]:
    if cost < CHEAP:
        return ()
    return (
        "skip what heads compute, but write their keys and values: relufy's masks at the input of o do so",
    )
