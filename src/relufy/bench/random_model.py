"""Models with random weights of a named shape: a config.json, and weights that are drawn when they are read.

Speed does not depend on what the weights are, only on how many of them are read. A tensor's numbers follow
from a seed and its place, so nothing is written that could be drawn again: packing a model of 7 billion
weights takes the disk of the packed file and the memory of one tensor.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relufy.activation_sparsity import BLOCK_KEY, RELUFY_ACT, ActivationSparsity, Predictor
from relufy.bench.densities import Densities, find_sparsifiers
from relufy.bench.shapes import Shape, find_shape
from relufy.engine.quantize import rounded_to_bfloat16
from relufy.engine.safetensors_folder import SafetensorsFolder
from relufy.files import cache_folder, replacing
from relufy.hub import read_config

POINTER = {"quant_method": "relufy", "version": 1}
"""The `quantization_config` of every relufied checkpoint: other converters then refuse it."""
RANDOM = "random_weights"
"""The key of config.json that says the shape and the seed of weights that are not stored."""
BLOCK_WEIGHTS = 1 << 16
"""How many weights are drawn at once, in the cache."""
UNIFORM_WIDTH = 12**0.5
"""The width of a uniform distribution of variance 1. It is drawn ten times faster than a normal one."""

Progress = Callable[[str, int, int], None]
"""Called with a task's name, what is done and the total."""


class RandomWeights(SafetensorsFolder):
    """A SafetensorsFolder without files: float32 of values that bfloat16 can hold, drawn when they are read.

    All are uniform. Matrices have variance 1 / inputs, the embedding 1; norms are 1 +- 0.1. `folder` holds
    their config.json. With `union`, only that share of each layer's gates, drawn at random, is not zero.
    With a `rank`, each layer has a predictor; `thresholds` are those of its scores, by layer.
    """

    def __init__(
        self,
        folder: Path,
        shape: Shape,
        seed: int,
        union: float | None = None,
        rank: int = 0,
        thresholds: Sequence[float] = (),
    ):
        self.folder, self._union, self._thresholds = folder, union, thresholds
        self._shapes, self._seed = shape.tensors() | _predictor_tensors(shape, rank), seed
        self._places = {name: place for place, name in enumerate(self._shapes)}

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> np.ndarray:
        """Return a tensor, the same each time."""
        if name.endswith("predictor.threshold"):
            return np.full(self._shapes[name], self._thresholds[int(name.split(".")[2])], np.float32)
        size, random = self._shapes[name], np.random.default_rng([self._seed, self._places[name]])
        middle, deviation = (1, 0.1) if len(size) == 1 else (0, 1 if "embed" in name else size[1] ** -0.5)
        values = np.empty(size, np.float32)
        flat = values.reshape(-1)
        for start in range(0, flat.size, BLOCK_WEIGHTS):
            block = flat[start : start + BLOCK_WEIGHTS]
            random.random(dtype=np.float32, out=block)
            block -= np.float32(0.5)
            block *= np.float32(UNIFORM_WIDTH * deviation)
            block += np.float32(middle)
            block[:] = rounded_to_bfloat16(block)
        if self._union is not None and "gate_proj" in name:
            silent = np.random.default_rng([self._seed, self._places[name], 1]).permutation(len(values))
            values[silent[round(self._union * len(values)) :]] = 0
        return values


def _predictor_tensors(shape: Shape, rank: int) -> dict[str, tuple[int, ...]]:
    sizes: dict[str, tuple[int, ...]] = {
        "inner": (rank, shape.hidden_size),
        "outer": (shape.intermediate_size, rank),
    }
    sizes["threshold"] = (shape.intermediate_size,)
    layers = range(shape.num_layers) if rank else ()
    return {
        f"model.layers.{index}.mlp.gate_proj.predictor.{name}": size
        for index in layers
        for name, size in sizes.items()
    }


def open_weights(folder: Path) -> SafetensorsFolder:
    """Return the weights of a checkpoint, or those that its config.json says to draw."""
    random = read_config(folder).get(RANDOM)
    if random is None:
        return SafetensorsFolder(folder)
    own = {name: random[name] for name in ("union", "rank", "thresholds") if name in random}
    return RandomWeights(folder, find_shape(random["shape"]), int(random["seed"]), **own)


def bench_folder() -> Path:
    """Return the folder of what benchmarks make and keep."""
    return cache_folder() / "bench"


def dense_model(shape: Shape, seed: int) -> Path:
    """Return the folder of a shape's random model, made on first use."""
    return _model_folder(f"{shape.name}-random{seed}", _config(shape, seed))


def sparse_model(shape: Shape, densities: Densities, context: int, seed: int, progress: Progress) -> Path:
    """Return the folder of the same weights (but for silent gates, with a union) whose sites have the
    densities at a context, made on first use."""
    folder = bench_folder() / f"{shape.name}-random{seed}-{densities.label()}-context{context}"
    if folder.is_dir():
        return folder
    weights = RandomWeights(folder, shape, seed, densities.union, densities.rank)
    found = find_sparsifiers(weights, shape.config(), densities, context, seed, progress)
    own, predictor = {}, None
    if densities.rank:
        own = {"rank": densities.rank, "thresholds": found.predictor_thresholds}
        predictor = Predictor("random", densities.rank, recall=1.0, dense_first_tokens=0)
    sparsity = ActivationSparsity(tuple(found.sparsifiers), predictor=predictor)
    config = _config(shape, seed, densities.union, **own) | sparse_settings(sparsity)
    return _model_folder(folder.name, config)


def sparse_settings(sparsity: ActivationSparsity) -> dict[str, Any]:
    """Return what a relufied checkpoint's config.json says beyond the dense one's."""
    return {"hidden_act": RELUFY_ACT, BLOCK_KEY: sparsity.to_block(), "quantization_config": POINTER}


def _config(shape: Shape, seed: int, union: float | None = None, **own: Any) -> dict[str, Any]:
    own |= {} if union is None else {"union": union}
    return shape.config() | {RANDOM: {"shape": shape.name, "seed": seed} | own}


def _model_folder(name: str, config: dict[str, Any]) -> Path:
    folder = bench_folder() / name
    if not folder.is_dir():
        with replacing(folder) as temporary:
            temporary.mkdir()
            (temporary / "config.json").write_text(json.dumps(config, indent=2))
    return folder
