"""What every model of a study is judged by: held-out perplexity, zeros, costs."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from relufy.measure.cett import cett_sparsity
from relufy.measure.measure import model_macs
from relufy.measure.quality import evaluating, perplexity
from relufy.measure.sparsity import measure_sparsity
from relufy.train.monitor import Monitor
from studies.texts import Texts

BATCH = 64


@dataclass(frozen=True)
class Evaluation:
    """Of a model on the test text; `valid` alone is of the validation text."""

    nats: float
    standard_error: float
    per_window: list[float]
    """Nats per token of each test window, for paired comparisons."""
    valid: float
    sparsity: dict[str, list[float]]
    """Exact zeros by site and layer."""
    live_sparsity: list[float]
    """Of the neurons that are not dead."""
    dead: list[float]
    union_density: list[float]
    """Of neurons over 8 tokens."""
    macs_paper: dict[str, list[float]]
    """Dense and sparse, with the head and without."""
    cett: float | None
    """The share of neurons that can be left out at CETT 0.2."""


def evaluate(model: Any, texts: Texts, cett: bool) -> Evaluation:
    """Return what the model is like on the test text."""
    found = perplexity(model, texts.test, BATCH)
    shares = {
        site: list(layers) for site, layers in measure_sparsity(model, texts.test, BATCH).sparsity.items()
    }
    watched = _watch(model, texts.test)
    macs = model_macs(model, shares)
    head = model.config.vocab_size * model.config.hidden_size
    return Evaluation(
        nats=found.nats_per_token,
        standard_error=found.standard_error,
        per_window=[round(value, 5) for value in found.per_window],
        valid=perplexity(model, texts.valid, BATCH).nats_per_token,
        sparsity=shares,
        live_sparsity=watched.get("live_sparsity", []),
        dead=watched.get("dead", []),
        union_density=watched.get("union_density", []),
        macs_paper={
            "with_head": [macs.dense, macs.sparse],
            "blocks": [macs.dense - head, macs.sparse - head],
        },
        cett=cett_sparsity(model, texts.test[:128], batch_size=BATCH).mean if cett else None,
    )


def _watch(model: Any, windows: np.ndarray) -> dict[str, Any]:
    monitor = Monitor(model)
    with monitor.watching(), evaluating(model):
        for start in range(0, len(windows), BATCH):
            batch = torch.from_numpy(windows[start : start + BATCH]).to(model.device)
            model(input_ids=batch, use_cache=False, logits_to_keep=1)
    return json.loads(json.dumps(monitor.metrics()))
