"""What our engine reads from memory for one token: `bytes_engine`, which bounds its speed.

Weights with their scales and padding, lists of active inputs and neurons, norms, keys and values, as the
engine itself counts them (csrc/forward.cpp, csrc/mlp.cpp). Biases, thresholds and positions are too small to
count, there and here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from relufy.engine.layer_spec import LayerSpec
from relufy.engine.pack import is_bundled, is_by_input
from relufy.engine.packed_file import padded
from relufy.engine.packed_numbers import SHARES, numbers
from relufy.engine.packed_writer import VECTOR_PADDING
from relufy.engine.quantize import CHUNK, GROUPS, INTEGER, LINE, row_bytes, row_dtype
from relufy.engine.safetensors_folder import SafetensorsFolder
from relufy.engine.source_tensors import correction_rank
from relufy.engine.spec import LAYER_NORMS, DecoderSpec
from relufy.measure.cost import HEAD, Cost, DenseSparse, Sparsity, cost_of

SCALE_BYTES = 4
INDEX_BYTES = 4
KV_BLOCK = 32
KV_BYTES = {"f32": 4, "bf16": 2, "f16": 2}

KIND = {
    **dict.fromkeys(("q", "k", "v"), "q k v"),
    **dict.fromkeys(("up", "down"), "up and down"),
    **{name: name for name in ("o", "gate")},
}
"""Matrix -> the kind of bytes that its weights are."""
SITES = ("q", "k", "v", "o", "gate", "up", "down")
LISTS = "norms and lists"
EMBEDDING = "embedding and head"


@dataclass(frozen=True)
class Packing:
    """How a model is stored, where the bytes depend on it; see `relufy.pack` and `relufy.Engine`.

    `ranks` gives the rank of each low-rank correction by layer and site (`correction_ranks`); a model without
    corrections needs none.
    """

    dtype: str = "f32"
    kv_dtype: str | None = None
    for_: str = "exact"
    ranks: Mapping[tuple[int, str], int] = field(default_factory=dict)

    @property
    def wide_dtype(self) -> str:
        """The type of embedding and head."""
        return "int8" if self.dtype == "int4" else self.dtype

    @property
    def float_dtype(self) -> str:
        """The type of low-rank corrections."""
        return "f32" if self.dtype == "f32" else "bf16"

    @property
    def kv_bytes(self) -> int:
        """The bytes of a number in the KV cache; by default the engine's choice for the dtype."""
        return KV_BYTES[self.kv_dtype or ("f32" if self.dtype == "f32" else "f16")]


F32 = Packing()


@dataclass(frozen=True)
class Reading:
    """Bytes that are read for one token in one way: as a stream, or by a list of rows or columns.

    `share` is the share of the matrix that is listed; layer and site are those of a projection.
    """

    kind: str
    bytes: float
    how: Literal["stream", "rows", "columns"] = "stream"
    share: float = 1.0
    layer: int | None = None
    site: str = ""


def correction_ranks(spec: DecoderSpec, weights: SafetensorsFolder) -> dict[tuple[int, str], int]:
    """Return the rank of each low-rank correction of a checkpoint, by layer and site."""
    return {
        (index, site): correction_rank(weights, spec, index, site)
        for index, layer in enumerate(spec.layers)
        for site, mask in layer.masks.items()
        if mask.correction
    }


def bytes_engine(spec: DecoderSpec, sparsity: Sparsity, context: int, packing: Packing = F32) -> Cost:
    """Return the bytes that the engine reads for one token at `context` positions.

    Dense means the same model packed with no sparsifier at all, in the same types, not the sparse file with
    skipping off. Its parts are sites, `head` (the embedding's row with it), `keys and values`, and
    `norms and lists`.
    """
    dense_layers = tuple(
        replace(s, activation="silu", has_up_relu=False, deviations=None, masks={}) for s in spec.layers
    )
    dense = _bytes_by_part(replace(spec, layers=dense_layers), {}, context, packing)
    sparse = _bytes_by_part(spec, sparsity, context, packing)
    return cost_of({part: DenseSparse(dense[part], sparse[part]) for part in dense})


def _bytes_by_part(spec: DecoderSpec, sparsity: Sparsity, context: int, packing: Packing) -> dict[str, float]:
    parts: dict[str, float] = {}
    for reading in readings(spec, sparsity, context, packing):
        part = HEAD if reading.kind == EMBEDDING else reading.site or reading.kind
        parts[part] = parts.get(part, 0.0) + reading.bytes
    return {part: parts[part] for part in sorted(parts, key=_place)}


def _place(part: str) -> int:
    return SITES.index(part) if part in SITES else len(SITES) + (part != HEAD)


def bytes_by_kind(
    spec: DecoderSpec, sparsity: Sparsity, context: int, packing: Packing = F32
) -> dict[str, float]:
    """Return the bytes read for one token, by what is read. The engine's own counter agrees (a test).

    A site that `sparsity` does not name has the zeros of the one whose mask it shares, else none; `down` has
    at least those of `neuron`.
    """
    kinds = dict.fromkeys((EMBEDDING, *KIND.values(), "keys and values", LISTS), 0.0)
    for reading in readings(spec, sparsity, context, packing):
        kinds[reading.kind] += reading.bytes
    return kinds


def readings(
    spec: DecoderSpec, sparsity: Sparsity, context: int, packing: Packing = F32
) -> Iterator[Reading]:
    """Yield what is read for one token, and how; `bytes_by_kind` is the sum of it."""
    wide = packing.wide_dtype
    embedding = row_bytes(spec.hidden_size, wide)
    yield Reading(EMBEDDING, embedding + _row_bytes(spec.vocab_size, spec.hidden_size, wide))
    yield Reading("keys and values", sum(_kv_bytes(spec, layer, context, packing) for layer in spec.layers))
    yield Reading(LISTS, _norm_bytes(spec))
    flags = numbers(spec)
    for index, layer in enumerate(spec.layers):
        shared = {s: first for s, first in SHARES.items() if flags.get(f"layers.{index}.{s}.shares_{first}")}
        used = {site: 1 - values[index] for site, values in sparsity.items()}
        yield from _Layer(spec, layer, index, used, shared, packing).readings()


@dataclass(frozen=True)
class _Layer:
    """A layer in one packing. `used`: site -> share; `shared`: site -> the one whose list it reads by."""

    spec: DecoderSpec
    layer: LayerSpec
    index: int
    used: Mapping[str, float]
    shared: Mapping[str, str]
    packing: Packing

    def readings(self) -> Iterator[Reading]:
        """Yield what is read of this layer."""
        for name, (outputs, inputs) in self.spec.matrix_shapes().items():
            if name in ("up", "down") and is_bundled(self.spec, self.index, self.packing.for_):
                yield from self._neurons(name)
            elif is_by_input(self.spec, self.index, name, self.packing.for_):
                yield from self._columns(name, outputs, inputs)
            else:
                yield self._reading(name, _row_bytes(outputs, inputs, self.packing.dtype))
            if self._is_corrected(name):
                rank, dtype = self.packing.ranks[self.index, name], self.packing.float_dtype
                yield self._reading(name, rank * row_bytes(inputs, dtype) + outputs * row_bytes(rank, dtype))

    def _reading(
        self,
        name: str,
        amount: float,
        how: Literal["stream", "rows", "columns"] = "stream",
        share: float = 1.0,
    ) -> Reading:
        return Reading(KIND[name], amount, how, share, self.index, name)

    def _neurons(self, name: str) -> Iterator[Reading]:
        how, share = ("rows", self._share("neuron")) if name == "up" else ("columns", self._share("down"))
        listed = self.spec.intermediate_size * share
        amount = _row_bytes(listed, self.spec.hidden_size, self.packing.dtype)
        yield self._reading(name, amount, how, share)  # type: ignore[arg-type]
        yield Reading(LISTS, listed * INDEX_BYTES)

    def _columns(self, name: str, outputs: int, inputs: int) -> Iterator[Reading]:
        share = self._share(name)
        listed, dtype = inputs * share, row_dtype(outputs, self.packing.dtype)
        reads_whole_rows = name == "down" and not self._is_corrected(name)
        stored = row_bytes(outputs, dtype) if reads_whole_rows else _part_bytes(outputs, dtype)
        yield self._reading(name, listed * (stored + _scale_bytes(dtype)), "columns", share)
        if name not in self.shared:
            yield Reading(LISTS, listed * INDEX_BYTES)

    def _share(self, site: str) -> float:
        substitute = self.shared.get(site) or ("neuron" if site == "down" else site)
        return self.used.get(site, self.used.get(substitute, 1.0))

    def _is_corrected(self, name: str) -> bool:
        mask = self.layer.masks.get(name)
        return mask is not None and mask.correction is not None


def _norm_bytes(spec: DecoderSpec) -> int:
    """Norms of hidden states, as vectors are stored; those of queries and keys are too small to count."""
    count = 1 + spec.num_layers * sum(spec.family.has(norm) for norm in LAYER_NORMS)
    return count * -(-spec.hidden_size // VECTOR_PADDING) * VECTOR_PADDING * 4


def _kv_bytes(spec: DecoderSpec, layer: LayerSpec, context: int, packing: Packing) -> float:
    """Keys are read in whole blocks, values by position, from the first one in the layer's window on."""
    first = max(0, context - (layer.window or context))
    key_positions = (-(-context // KV_BLOCK) - first // KV_BLOCK) * KV_BLOCK
    count = key_positions * spec.head_dim + (context - first) * padded(spec.head_dim)
    return spec.num_kv_heads * count * packing.kv_bytes


def _row_bytes(rows: float, count: int, dtype: str) -> float:
    """Return the bytes of so many stored rows, with their scales."""
    dtype = row_dtype(count, dtype)
    return rows * (row_bytes(count, dtype) + _scale_bytes(dtype))


def _part_bytes(count: int, dtype: str) -> int:
    """Return the bytes of a stored row without those that pad its group scales to a line."""
    return -(-count // CHUNK[dtype]) * (LINE + GROUPS) if dtype == "int4" else row_bytes(count, dtype)


def _scale_bytes(dtype: str) -> int:
    return SCALE_BYTES if dtype in INTEGER else 0
