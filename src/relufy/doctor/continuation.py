"""Texts continued greedily, and how two models' continuations differ along their length."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from relufy.measure.quality import evaluating, log_likelihood

BUCKETS = 4


def continue_greedily(
    model: PreTrainedModel,
    prompts: np.ndarray,
    new_tokens: int,
    masks: AbstractContextManager | None = None,
    batch_size: int = 8,
) -> np.ndarray:
    """Return what a model writes after prompts, int64 `[prompts, length]` -> `[prompts, new_tokens]`."""
    config = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, num_beams=1, pad_token_id=0
    )
    written = []
    with evaluating(model), masks or nullcontext():
        for start in range(0, len(prompts), batch_size):
            ids = torch.from_numpy(prompts[start : start + batch_size]).to(model.device)
            found = model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
            )
            written.append(found[:, ids.shape[1] :].cpu().numpy())
    return np.concatenate(written)


def agreement(first: np.ndarray, second: np.ndarray) -> tuple[list[float], list[int]]:
    """Return the share of texts that are still the same at each token, and where each pair parts."""
    parted = np.cumsum(first != second, axis=1) > 0
    lengths = [int(row.argmax()) if row.any() else len(row) for row in parted]
    return (1 - parted.mean(0)).tolist(), lengths


def greedy_matches(
    model: PreTrainedModel,
    prompts: np.ndarray,
    written: np.ndarray,
    masks: AbstractContextManager | None = None,
) -> float:
    """Return the share of tokens that a model would choose too, were it given the text up to each."""
    hits = [(logits.argmax(-1) == ids).float() for logits, ids in _over(model, prompts, written, masks)]
    return float(torch.cat(hits).mean())


def losses_along(model: PreTrainedModel, prompts: np.ndarray, written: np.ndarray) -> list[float]:
    """Return the mean loss of a text's tokens under a model, nats, in equal parts of its length."""
    losses = torch.cat([-log_likelihood(logits, ids) for logits, ids in _over(model, prompts, written, None)])
    return [float(part.mean()) for part in losses.chunk(BUCKETS, dim=1)]


def _over(
    model: PreTrainedModel, prompts: np.ndarray, written: np.ndarray, masks: AbstractContextManager | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the logits for each written token, and the tokens, a text at a time."""
    with evaluating(model), masks or nullcontext():
        for prompt, text in zip(prompts, written, strict=True):
            ids = torch.from_numpy(np.concatenate([prompt, text]))[None].to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, len(prompt) - 1 : -1]
            yield logits, ids[:, len(prompt) :]


def survival(share: float, lengths: Sequence[int]) -> list[float]:
    """Return what independent slips would leave in agreement after so many tokens."""
    return [share**length for length in lengths]
