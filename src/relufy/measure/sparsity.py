"""The share of zeros at every site of a model, over a text."""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from relufy.model.observe import observe_sites


@dataclass(frozen=True)
class SiteSparsity:
    """The exact share of zeros, a mean over `tokens` positions (every position of every window)."""

    tokens: int
    sparsity: dict[str, tuple[float, ...]]
    """Site -> one share per layer."""

    @property
    def mean(self) -> dict[str, float]:
        """Site -> the plain mean over its layers, which all have the same width."""
        return {site: sum(layers) / len(layers) for site, layers in self.sparsity.items()}


def measure_sparsity(model: PreTrainedModel, windows: np.ndarray, batch_size: int = 16) -> SiteSparsity:
    """Run the model over windows, int64 `[windows, length]`, and return the share of zeros at each site."""
    was_training = model.training
    model.eval()
    with observe_sites(model) as observer, torch.inference_mode():
        for start in range(0, len(windows), batch_size):
            batch = torch.from_numpy(windows[start : start + batch_size]).to(model.device)
            model(input_ids=batch, use_cache=False, logits_to_keep=1)
    model.train(was_training)
    return SiteSparsity(
        observer.tokens, {site: tuple(layers) for site, layers in observer.sparsity().items()}
    )
