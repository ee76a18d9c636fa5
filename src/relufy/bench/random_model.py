"""A checkpoint with random weights of a named shape, and one with the same weights and chosen densities.

Speed does not depend on what the weights are, only on how many of them are read. The weights are written once
for each shape; a model of other densities is another config.json beside a link to them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from relufy.activation_sparsity import BLOCK_KEY, RELUFY_ACT, ActivationSparsity
from relufy.bench.densities import Densities, find_sparsifiers
from relufy.bench.shapes import Shape
from relufy.files import cache_folder, replacing

WEIGHTS = "model.safetensors"
POINTER = {"quant_method": "relufy", "version": 1}
"""The `quantization_config` of every relufied checkpoint: other converters then refuse it."""

Progress = Callable[[str, int, int], None]
"""Called with a task's name, what is done and the total."""


def bench_folder() -> Path:
    """Return the folder of what benchmarks make and keep."""
    return cache_folder() / "bench"


def dense_model(shape: Shape, seed: int, progress: Progress) -> Path:
    """Return the checkpoint of random bfloat16 weights of a shape, written on first use."""
    folder = bench_folder() / f"{shape.name}-seed{seed}"
    if not folder.is_dir():
        with replacing(folder) as temporary:
            temporary.mkdir()
            write_weights(shape, temporary / WEIGHTS, seed, progress)
            (temporary / "config.json").write_text(json.dumps(shape.config(), indent=2))
    return folder


def sparse_model(shape: Shape, densities: Densities, context: int, seed: int, progress: Progress) -> Path:
    """Return the checkpoint of the same weights whose sites have the densities at a context, made on first
    use."""
    dense = dense_model(shape, seed, progress)
    folder = dense.with_name(f"{dense.name}-{densities.label()}-context{context}")
    if not folder.is_dir():
        sparsifiers = find_sparsifiers(dense, densities, context, seed, progress)
        with replacing(folder) as temporary:
            temporary.mkdir()
            (temporary / WEIGHTS).symlink_to(Path("..") / dense.name / WEIGHTS)
            config = shape.config() | sparse_settings(ActivationSparsity(tuple(sparsifiers)))
            (temporary / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def sparse_settings(sparsity: ActivationSparsity) -> dict[str, Any]:
    """Return what a relufied checkpoint's config.json says beyond the dense one's."""
    return {"hidden_act": RELUFY_ACT, BLOCK_KEY: sparsity.to_block(), "quantization_config": POINTER}


def write_weights(shape: Shape, path: Path, seed: int, progress: Progress) -> None:
    """Write one safetensors file of bfloat16 weights with variance 1 / inputs, tensor by tensor."""
    tensors = shape.tensors()
    with path.open("wb") as file:
        file.write(_header(tensors))
        for index, (name, size) in enumerate(tensors.items()):
            values = np.random.default_rng([seed, index]).standard_normal(size, dtype=np.float32)
            if len(size) == 1:
                values = 1 + 0.1 * values
            elif "embed" not in name:
                values *= np.float32(size[1] ** -0.5)
            file.write(to_bfloat16(values).tobytes())
            progress("writing random weights", index + 1, len(tensors))


def _header(tensors: dict[str, tuple[int, ...]]) -> bytes:
    table, end = {}, 0
    for name, size in tensors.items():
        start, end = end, end + 2 * int(np.prod(size, dtype=np.int64))
        table[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [start, end]}
    document = json.dumps({"__metadata__": {"format": "pt"}, **table}).encode()
    document += b" " * (-len(document) % 8)
    return len(document).to_bytes(8, "little") + document


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Return float32 values as the bits of bfloat16, rounded to nearest even. No NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
