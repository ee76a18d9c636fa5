"""The specification of the engine's masks: which entries of an input are kept."""

import numpy as np

RELU, THRESHOLD, TOPK = 1, 2, 3
"""The file's numbers for what selects; 0 is no mask."""

DEFAULTS = (("thresholds", 0.0), ("weight", 1.0), ("centre", 0.0))
"""A mask's vectors, and their values where a file has none."""


def keep(
    x: np.ndarray,
    select: int,
    k: int,
    thresholds: np.ndarray | float = 0.0,
    weight: np.ndarray | float = 1.0,
    centre: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Return which entries of `[tokens, channels]` are kept, as booleans.

    A score equal to its threshold is kept; of equal scores, top-k keeps those of the lower channels.
    """
    if select == RELU:
        return x > 0
    score = weight * np.abs(x - centre)
    if select == THRESHOLD:
        return score >= thresholds
    if select == TOPK:
        ranks = np.argsort(np.argsort(-score, axis=-1, kind="stable"), axis=-1, kind="stable")
        return ranks < k
    return np.ones(x.shape, bool)


def margin(
    x: np.ndarray,
    select: int,
    k: int,
    thresholds: np.ndarray | float = 0.0,
    weight: np.ndarray | float = 1.0,
    centre: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Return how near the closest score of each token is to its cut, relative to the cut: `[tokens]`."""
    score = weight * np.abs(x - centre)
    if select == THRESHOLD:
        return relative_distance(score, thresholds)
    if select == TOPK and k < x.shape[1]:
        ordered = -np.sort(-score, axis=-1)
        return (ordered[:, k - 1] - ordered[:, k]) / np.maximum(ordered[:, k - 1], 1e-30)
    return np.full(len(x), np.inf)


def relative_distance(score: np.ndarray, cut: np.ndarray | float) -> np.ndarray:
    """Return `min |score - cut| / cut` of each token; a cut of zero has nothing on its other side."""
    distance = np.abs(score - cut) / np.maximum(cut, 1e-30)
    return np.where(np.broadcast_to(cut, score.shape) > 0, distance, np.inf).min(-1)
