"""Short hashes of weights, so that what was derived from a weight is not used with another one.

Column norms and low-rank factors are of the weights that a model was calibrated with. The block's provenance
says of which, in `derived_from`: the weight's name -> its fingerprint. A fingerprint is the same in float32
and in bfloat16, and numpy is enough to compute it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from relufy.errors import UserError

DERIVED_FROM = "derived_from"
"""The key of the provenance."""

SAMPLES = 65_536
"""Entries of a weight that are hashed, evenly spread over it."""

_HEX_DIGITS = 16


def fingerprint(weight: np.ndarray) -> str:
    """Return the fingerprint of a weight, float32 of any shape."""
    return fingerprint_of(weight.shape, weight.reshape(-1)[sampled(weight.size)])


def fingerprint_of(shape: Sequence[int], samples: np.ndarray) -> str:
    """Return the fingerprint of a weight, given its shape and its entries at `sampled` places, float32."""
    digest = hashlib.sha256("x".join(map(str, shape)).encode())
    digest.update(_as_bfloat16(samples).astype("<u2").tobytes())
    return digest.hexdigest()[:_HEX_DIGITS]


def sampled(size: int) -> np.ndarray:
    """Return the places of the entries that are hashed of so many, int64, in ascending order."""
    count = min(size, SAMPLES)
    return np.arange(count, dtype=np.int64) * (size - 1) // max(count - 1, 1)


def recorded(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Return the fingerprints that a block's provenance records. Raises UserError if they are damaged."""
    found = provenance.get(DERIVED_FROM) or {}
    if not isinstance(found, Mapping) or not all(isinstance(value, str) for value in found.values()):
        raise UserError(f"config.json: {DERIVED_FROM} in the provenance should map weights to fingerprints")
    return dict(found)


def refuse_other_weight(where: str, name: str, expected: str, found: str) -> None:
    """Raise UserError if a weight is not the one that tensors were derived from."""
    if found != expected:
        raise UserError(
            f"{where}: {name} has changed since sparsifiers' tensors were derived from it (trained, merged "
            "with an adapter, or cast to float16); calibrate again with `relufy sparsify` (a predictor: with "
            "`relufy predictor`)"
        )


def refuse_missing_weight(where: str, name: str) -> NoReturn:
    """Raise UserError because a weight that tensors were derived from is not there."""
    raise UserError(
        f"{where} lacks {name}, which sparsifiers' tensors were derived from; calibrate again with "
        "`relufy sparsify`"
    )


def _as_bfloat16(values: np.ndarray) -> np.ndarray:
    """Return the leading 16 bits of float32 values, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
