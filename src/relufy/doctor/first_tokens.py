"""Check 7: the first tokens, apart from the rest: attention sinks, massive activations, what masks do there.

A sink is a position that most attention goes to (Xiao et al., arXiv 2309.17453); its hidden state often holds
massive activations (Sun et al., arXiv 2402.17762), which a threshold for all tokens keeps or cuts wrongly.
"""

from contextlib import contextmanager
from math import ceil
from typing import Any

import torch

from relufy.doctor.finding import Finding, percent, signed
from relufy.doctor.hidden_states import hidden_by_position
from relufy.doctor.patient import Patient
from relufy.measure.quality import evaluating
from relufy.model.selections import greatest
from relufy.model.trial import Mask, trial_masks

FIRST_SHARE = 0.01
"""Of a window: the first tokens, at least one."""
SINK = 0.3
"""A share of a layer's attention on the first token from which it is called a sink."""
TRIED = 0.5
"""The share of every projection's input that is left out to see what the first token minds."""
MATTERS = 0.005
"""Nats a token."""


def check(patient: Patient) -> Finding:
    """Return attention on the first token, massive activations, and what masking the first token costs."""
    first = max(1, ceil(FIRST_SHARE * patient.test.shape[1]))
    figures: dict[str, Any] = {"first_tokens": first, "tried_share": TRIED}
    figures |= hidden_by_position(patient, first)
    figures |= _attention(patient)
    everywhere, but_first = (_masked(patient, keep) for keep in (0, 1))
    (masked, spared), cost = map(patient.nats, (everywhere, but_first)), everywhere.minus(but_first)
    figures |= {
        "masked_everywhere": {"nats_more": masked[0], "standard_error": masked[1]},
        "first_token_dense": {"nats_more": spared[0], "standard_error": spared[1]},
        "cost_of_masking_the_first": {"nats_more": cost.mean, "standard_error": cost.standard_error},
    }
    costs = cost.mean > MATTERS and cost.mean > 2 * cost.standard_error
    has_sink = bool(figures["sink_layers"]) or bool(figures["massive_layers"])
    status = "bad" if costs else "watch" if has_sink else "good"
    advice = _advice(patient, costs, has_sink)
    return Finding("first_tokens", "The first tokens", status, _verdict(figures), figures, advice)  # type: ignore[arg-type]


def _attention(patient: Patient) -> dict[str, Any]:
    """Return the mean share of attention on position 0, by layer, or why it is not known."""
    model = patient.model
    try:
        with _eager(model), evaluating(model):
            ids = torch.from_numpy(patient.test[:1]).to(model.device)
            found = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
        shares = [float(weights[..., ids.shape[1] // 4 :, 0].float().mean()) for weights in found]
        if len(shares) != len(patient.blocks):
            raise ValueError(f"{len(shares)} layers told their attention")
    except (ValueError, TypeError, AttributeError, RuntimeError, KeyError) as error:
        reason = f"{patient.kind} does not return its attention: {' '.join(str(error).split())[:120]}"
        return {"attention_on_first": None, "attention_reason": reason, "sink_layers": []}
    return {
        "attention_on_first": shares,
        "sink_layers": [layer for layer, share in enumerate(shares) if share >= SINK],
    }


@contextmanager
def _eager(model: Any) -> Any:
    """Let attention be computed so that its weights can be seen."""
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def _masked(patient: Patient, dense_first: int) -> Any:
    """Return the losses with a share of every input left out, but for the first tokens."""
    with trial_masks(patient.blocks) as trial:
        for block in patient.blocks:
            for group in block.groups():
                trial.put(block.index, group[0], _least_left_out(patient, dense_first))
        return patient.run()


def _least_left_out(patient: Patient, dense_first: int) -> Mask:
    def mask(x: torch.Tensor) -> torch.Tensor:
        kept = max(1, round((1 - TRIED) * x.shape[-1]))
        masked = torch.where(greatest(x.float().abs(), kept), x, torch.zeros_like(x))
        if not dense_first:
            return masked
        by_token = patient.scored.split(x, 1)[1]
        result = patient.scored.split(masked, 1)[1].clone()
        result[:, :dense_first] = by_token[:, :dense_first]
        return result.reshape(x.shape)

    return mask


def _verdict(figures: dict[str, Any]) -> str:
    words = []
    if figures["attention_on_first"] is None:
        words.append(f"{figures['attention_reason']}.")
    elif figures["sink_layers"]:
        most = max(figures["attention_on_first"])
        words.append(
            f"The first token is an attention sink in {len(figures['sink_layers'])} of "
            f"{len(figures['attention_on_first'])} layers (up to {percent(most, 0)} of the attention)."
        )
    else:
        most = max(figures["attention_on_first"])
        words.append(f"No attention sink: the first token gets {percent(most)} of the attention at most.")
    if figures["massive_layers"]:
        words.append(
            f"Massive activations: up to {figures['greatest_at_first']:.3g}, "
            f"{figures['greatest_ratio']:.3g} times the median, in {len(figures['massive_layers'])} layers."
        )
    everywhere, spared = (figures[name]["nats_more"] for name in ("masked_everywhere", "first_token_dense"))
    words.append(
        f"With the least half of every input left out: {signed(everywhere)}, with the first token dense "
        f"{signed(spared)}."
    )
    return " ".join(words)


def _advice(patient: Patient, costs: bool, has_sink: bool) -> tuple[str, ...]:
    if not costs:
        return ("calibration leaves the first position out by itself; nothing to set",) if has_sink else ()
    return (
        f"keep the first token dense: relufy sparsify {patient.name} -o thin --recipe teal "
        "--calibration TEXT --set sparsify.dense_first_tokens=1",
    )
