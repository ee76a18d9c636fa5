"""A checkpoint's tensors as the engine wants them: by its names, split, with factors folded in.

Also the check that all of them are there, in the shapes that config.json says, and nothing else.
"""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatch

import numpy as np

from relufy.engine.family import STEM, Source
from relufy.engine.safetensors_folder import SafetensorsFolder
from relufy.engine.spec import DecoderSpec
from relufy.errors import UserError
from relufy.fingerprint import fingerprint, refuse_missing_weight, refuse_other_weight

IGNORED = ("*rotary_emb*", "*.attn.bias", "*.attention.bias", "*.masked_bias")
"""Tensors that old checkpoints hold and nobody needs: tables, and masks of attention."""

RESIDUAL = ("o", "down")
"""The matrices whose outputs are added to the hidden state."""


def norm_of(site: str) -> str:
    """Return the norm whose output the projections of q k v, or of gate up, read."""
    return "attention_norm" if site in ("q", "k", "v") else "mlp_norm"


def mask_module(spec: DecoderSpec, layer: int, site: str) -> str:
    """Return the name of the checkpoint's module that holds the tensors of a site's mask."""
    if site == "neuron":
        return spec.family.module("activation", layer)
    is_shared = spec.shares_mask(layer, site)
    return spec.family.module(norm_of(site) if is_shared else site, layer) + ".sparsifier"


def predictor_module(spec: DecoderSpec, layer: int) -> str:
    """Return the name of the checkpoint's module that holds a layer's predictor."""
    return spec.family.source("gate" if spec.family.is_gated else "up", layer).module + ".predictor"


class SourceTensors:
    """Gives the tensors of a checkpoint. Raises UserError if it lacks one, or holds one that has no place.

    `fingerprints` are those of weights that masks' tensors were derived from, by name: a weight with another
    one is refused when it is read, a name that no weight has at once.
    """

    def __init__(
        self, weights: SafetensorsFolder, spec: DecoderSpec, fingerprints: Mapping[str, str] | None = None
    ):
        self._weights, self._spec, self._family = weights, spec, spec.family
        self._fingerprints = fingerprints or {}
        self._names = _names(weights, spec)
        self._check()

    def norm(self, name: str, layer: int | None = None) -> dict[str, np.ndarray]:
        """Return the weight of a norm, and its bias if it has one."""
        kinds = ("weight", "bias") if self._family.norm == "layer" else ("weight",)
        found = {kind: self._read(f"{self._family.module(name, layer)}.{kind}") for kind in kinds}
        found["weight"] = found["weight"] + np.float32(self._family.norm_offset)
        scale = self._spec.logit_scale if name == "final_norm" else 1.0
        return {kind: _scaled(values, scale) for kind, values in found.items()}

    def table(self, name: str) -> np.ndarray:
        """Return the embedding, the head, or the table of positions from position 0 on."""
        rows = self._read(self._family.module(name) + ".weight")
        return rows[self._family.position_offset :] if name == "position_embedding" else rows

    def matrix(self, layer: int, name: str) -> np.ndarray:
        """Return a layer's matrix, float32 `[outputs, inputs]`."""
        source = self._family.source(name, layer)
        whole = self._read(source.module + ".weight")
        return self._part(source, name, whole.T if self._family.is_transposed else whole)

    def bias(self, layer: int, name: str) -> np.ndarray:
        source = self._family.source(name, layer)
        return self._part(source, name, self._read(source.module + ".bias"))

    def mask(self, layer: int, site: str, tensor: str) -> np.ndarray:
        """Return a tensor of a site's mask, or a factor of its correction."""
        values = self._read(f"{mask_module(self._spec, layer, site)}.{tensor}")
        is_output = tensor == "low_rank_out"
        return self._part(self._family.source(site, layer), site, values) if is_output else values

    def predictor(self, layer: int, tensor: str) -> np.ndarray:
        """Return a tensor of a layer's predictor: inner, outer or threshold, in float32."""
        return self._read(f"{predictor_module(self._spec, layer)}.{tensor}")

    def _read(self, name: str) -> np.ndarray:
        values = self._weights.read(self._names.get(name, name))
        if name in self._fingerprints:
            found = fingerprint(values)
            refuse_other_weight(str(self._weights.folder), name, self._fingerprints[name], found)
        return values

    def _part(self, source: Source, name: str, whole: np.ndarray) -> np.ndarray:
        """Return the rows that belong to one projection, of the outputs of all that the module holds."""
        sizes = {other: self._spec.matrix_shapes()[other][0] for other in source.holds}
        is_by_head = self._family.fuses_by_head and "q" in sizes
        groups = self._spec.num_kv_heads if is_by_head else 1
        begin = sum(list(sizes.values())[: source.holds.index(name)]) // groups
        rows = whole.reshape(groups, -1, *whole.shape[1:])[:, begin : begin + sizes[name] // groups]
        part = rows.reshape(sizes[name], *whole.shape[1:])
        return _scaled(part, self._spec.residual_scale if name in RESIDUAL else 1.0)

    def _check(self) -> None:
        expected, folder = dict(self._expected()), self._weights.folder
        for name, shape in expected.items():
            found = self._weights.shape(self._names.get(name, name))
            if found != shape:
                raise UserError(f"{folder}: {name} has shape {list(found)}, config.json says {list(shape)}")
        for name in self._fingerprints:
            if name not in expected:
                refuse_missing_weight(str(folder), name)
        known = {self._names.get(name, name) for name in expected}
        if self._spec.tied_head:
            head = self._family.module("head") + ".weight"
            known.add(self._names.get(head, head))
        ignored = (*IGNORED, *(f"{start}*" for start in self._family.ignored))
        for name in self._weights.names():
            if name not in known and not any(fnmatch(name, pattern) for pattern in ignored):
                raise UserError(f"{folder}: the engine has no place for the tensor {name}")

    def _expected(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        spec, family = self._spec, self._family
        rows = {"embedding": spec.vocab_size, "position_embedding": spec.max_context + family.position_offset}
        rows |= {} if spec.tied_head else {"head": spec.vocab_size}
        for name in STEM:
            if name in rows and family.has(name):
                yield family.module(name) + ".weight", (rows[name], spec.hidden_size)
        yield from self._norm_shapes(family.module("final_norm"), spec.hidden_size)
        for layer in range(spec.num_layers):
            for norm, width in spec.norm_widths().items():
                yield from self._norm_shapes(family.module(norm, layer), width)
            for name in spec.matrix_shapes():
                yield from self._matrix_shapes(family.source(name, layer), name)
            for site in spec.layers[layer].masks:
                yield from self._mask_shapes(layer, site)
            yield from self._predictor_shapes(layer)

    def _norm_shapes(self, module: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        for kind in ("weight", "bias") if self._family.norm == "layer" else ("weight",):
            yield f"{module}.{kind}", (width,)

    def _matrix_shapes(self, source: Source, name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        outputs, inputs = self._outputs(source), self._spec.matrix_shapes()[name][1]
        shape = (inputs, outputs) if self._family.is_transposed else (outputs, inputs)
        yield source.module + ".weight", shape
        if name in self._spec.biased:
            yield source.module + ".bias", (outputs,)

    def _mask_shapes(self, layer: int, site: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        spec, module = self._spec, mask_module(self._spec, layer, site)
        mask = spec.layers[layer].masks[site]
        inputs = spec.intermediate_size if site == "neuron" else spec.matrix_shapes()[site][1]
        for name in mask.per_channel:
            yield f"{module}.{name}", (inputs,)
        if mask.correction:
            rank, outputs = (
                correction_rank(self._weights, spec, layer, site),
                self._outputs(self._family.source(site, layer)),
            )
            yield f"{module}.low_rank_in", (rank, inputs)
            yield f"{module}.low_rank_out", (outputs, rank)

    def _predictor_shapes(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        if (predictor := self._spec.layers[layer].predictor) is not None:
            module, neurons = predictor_module(self._spec, layer), self._spec.intermediate_size
            yield f"{module}.inner", (predictor.rank, self._spec.hidden_size)
            yield f"{module}.outer", (neurons, predictor.rank)
            yield f"{module}.threshold", (neurons,)

    def _outputs(self, source: Source) -> int:
        return sum(self._spec.matrix_shapes()[name][0] for name in source.holds)


def correction_rank(weights: SafetensorsFolder, spec: DecoderSpec, layer: int, site: str) -> int:
    """Return the rank of a site's low-rank correction, which its tensors alone tell."""
    return weights.shape(f"{mask_module(spec, layer, site)}.low_rank_in")[0]


def _scaled(values: np.ndarray, scale: float) -> np.ndarray:
    return values if scale == 1.0 else values * np.float32(scale)


def _names(weights: SafetensorsFolder, spec: DecoderSpec) -> dict[str, str]:
    """Return what modules are called here, where not as the family says, by the names of their weights.

    A model saved without its head lacks the first word of its names; and see `Family.renamed`.
    """
    family, found = spec.family, {}
    for name, other in family.renamed.items():
        there = [own for own in weights.names() if own.startswith(f"{other}.")]
        changed = {name + own.removeprefix(other): own for own in there}
        found |= {name: own for name, own in changed.items() if name not in weights}
    embedding = family.module("embedding") + ".weight"
    base = embedding.partition(".")[0] + "."
    if embedding not in weights and embedding.removeprefix(base) in weights:
        found |= {base + name: name for name in weights.names() if not name.startswith(base)}
    return found
