"""The mode "predicted": what a predictor did to a generation. csrc/predict.cpp does it; docs/decoding.md says
when it is of use."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from relufy.engine.packed_file import Header


@dataclass(frozen=True)
class PredictionStats:
    """What prediction did to some tokens: of the neurons of layers with a predictor, means over tokens.

    `candidate_share` is the share that the predictor named, `fired_share` the share that was then active; how
    many active ones it missed nobody knows, for their gates were not read (`relufy predictor` measures it).
    """

    exact_tokens: int
    predicted_tokens: int
    candidate_share: float
    fired_share: float

    def summary(self) -> str:
        """Return what changed, in a few words."""
        if not self.predicted_tokens:
            return "predictor: no token was predicted, so the text is exact"
        return (
            f"predictor, not exact: {100 * self.candidate_share:.1f} % of the neurons as candidates and "
            f"{100 * self.fired_share:.1f} % active"
        )


def prediction_stats(counts: Mapping[str, Any], header: Header) -> PredictionStats:
    """Return the figures of differences of an engine's `stats()`."""
    layers = sum(name.endswith(".predictor_in") for name in header.tensors)
    predicted, neurons = counts["limited"], int(header.numbers["intermediate_size"])
    total = max(1, predicted * neurons * layers)
    return PredictionStats(
        exact_tokens=counts["tokens"] - predicted,
        predicted_tokens=predicted,
        candidate_share=sum(counts["candidates"]) / total,
        fired_share=sum(counts["fired"]) / total,
    )
