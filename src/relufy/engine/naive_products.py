"""The specification of the engine's products: a stored matrix times inputs, in float64.

The inputs of integer matrices are rounded to 16 bits, and the sums are of whole numbers, which float64 holds
exactly (docs/format.md, "Arithmetic").
"""

import numpy as np

from relufy.engine.packed_tensors import StoredMatrix
from relufy.engine.quantize import INTEGER

LARGEST = 32512
"""The greatest magnitude of a rounded input: 127 * 256, so that its two bytes fit signed products."""


def multiply(matrix: StoredMatrix, x: np.ndarray, emulate: bool) -> np.ndarray:
    """Return `[tokens, outputs]` for a matrix stored by output."""
    if not emulate or matrix.dtype not in INTEGER:
        return matrix.times(x)
    q, step = rounded(x)
    sums = [q @ (whole * k).T.astype(np.float64) for _, whole, k in matrix.integer_blocks()]
    return np.concatenate(sums, axis=1) * step * matrix.scales.astype(np.float64)


def multiply_by_input(matrix: StoredMatrix, x: np.ndarray, emulate: bool, partition: int) -> np.ndarray:
    """Return `[tokens, outputs]` for a matrix stored by input, whose partitions are rounded apart."""
    if not emulate or matrix.dtype not in INTEGER:
        return matrix.times(x)
    scaled = x * matrix.scales.astype(np.float64)
    starts = range(0, x.shape[1], partition)
    rounds = [rounded(scaled[:, start : start + partition]) for start in starts]
    q = np.concatenate([part for part, _ in rounds], axis=1)
    steps = np.repeat(np.concatenate([step for _, step in rounds], axis=1), partition, axis=1)
    out = np.zeros((len(x), matrix.count))
    for rows, whole, k in matrix.integer_blocks():
        for token in range(len(x)):
            out[token] += _sum(q[token, rows], steps[token, : x.shape[1]][rows], whole, k, matrix.dtype)
    return out


def _sum(q: np.ndarray, steps: np.ndarray, whole: np.ndarray, k: np.ndarray, dtype: str) -> np.ndarray:
    """Return one token's sum over some stored rows: of q w, or of q k / 128, rounded half up, times 128 e."""
    if dtype == "int8":
        return (q * steps) @ whole.astype(np.float64)
    rounded_products = np.floor(q[:, None] * k / 128 + 0.5)
    return 128 * (steps @ (rounded_products * whole))


def rounded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs as whole numbers of at most LARGEST, and the step of each token, `[tokens, 1]`."""
    step = np.abs(x).max(-1, keepdims=True) / LARGEST
    return np.rint(x / np.where(step > 0, step, 1)), step
