"""Reads the weights of a packed file back, mapped and decoded where they are asked for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from relufy.engine.packed_file import BUNDLE, COLUMNS, DTYPES, LAYOUTS, SCALES, TensorEntry, read_header
from relufy.engine.quantize import INTEGER, decode, integers, row_bytes
from relufy.errors import UserError

BLOCK_ROWS = 1024


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix of a packed file: its stored rows as bytes, mapped, uint8 `[stored rows, bytes]`.

    `by_input` tells that a stored row holds an input's weights to all outputs, else an output's weights.
    """

    raw: np.ndarray
    dtype: str
    count: int
    scales: np.ndarray
    by_input: bool

    @classmethod
    def open(cls, path: Path, entries: Mapping[str, TensorEntry], name: str) -> "StoredMatrix":
        """Return a matrix; `layers.0.up` and `layers.0.down` are also found in a bundle."""
        part = name.rpartition(".")[2]
        if name not in entries and part in ("up", "down"):
            bundle = name.removesuffix(part) + "up_down"
            entry, half = _entry(path, entries, bundle), ("up", "down").index(part)
        else:
            entry, half = _entry(path, entries, name), 0
        dtype = DTYPES[entry.dtype]
        width = row_bytes(entry.stored_count, dtype)
        raw = _map(path, entry)[:, half * width : (half + 1) * width]
        scales = np.ones(entry.stored_rows, np.float32)
        if dtype in INTEGER:
            scales = _map(path, _entry(path, entries, name + SCALES)).view("<f4")[0, : entry.stored_rows]
        by_input = entry.layout == COLUMNS or (entry.layout == BUNDLE and part == "down")
        return cls(raw, dtype, entry.stored_count, scales, by_input)

    def rows(self, wanted: np.ndarray) -> np.ndarray:
        """Return some stored rows, decoded."""
        return decode(self.raw[wanted], self.dtype, self.count, self.scales[wanted])

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield ranges of stored rows, decoded, float32 `[rows, count]`."""
        for rows in self._ranges():
            yield rows, decode(self.raw[rows], self.dtype, self.count, self.scales[rows])

    def integer_blocks(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Yield ranges of stored rows of int8 or int4: the whole numbers and each one's k, without scales."""
        for rows in self._ranges():
            yield rows, *integers(self.raw[rows], self.dtype, self.count)

    def times(self, x: np.ndarray) -> np.ndarray:
        """Return the products `[..., outputs]` of float64 inputs `[..., inputs]`, exactly dequantised."""
        if self.by_input:
            return sum(x[..., rows] @ block.astype(np.float64) for rows, block in self.blocks())  # type: ignore
        parts = [x @ block.T.astype(np.float64) for _, block in self.blocks()]
        return np.concatenate(parts, axis=-1)

    def weight(self) -> np.ndarray:
        """Return the whole matrix, float32 `[outputs, inputs]`."""
        stored = decode(self.raw, self.dtype, self.count, self.scales)
        return stored.T if self.by_input else stored

    def _ranges(self) -> Iterator[slice]:
        for start in range(0, len(self.raw), BLOCK_ROWS):
            yield slice(start, start + BLOCK_ROWS)


class PackedTensors:
    """The vectors and matrices of a packed file by name. Raises UserError for a name that is not there."""

    def __init__(self, path: Path | str):
        self.header = read_header(Path(path))

    def __contains__(self, name: str) -> bool:
        return name in self.header.tensors

    def vector(self, name: str) -> np.ndarray:
        """Return a vector, float32, without its padding."""
        entry = _entry(self.header.path, self.header.tensors, name)
        return _map(self.header.path, entry).view("<f4")[0, : entry.columns]

    def matrix(self, name: str) -> StoredMatrix:
        return StoredMatrix.open(self.header.path, self.header.tensors, name)

    def layout(self, name: str) -> str:
        return LAYOUTS[_entry(self.header.path, self.header.tensors, name).layout]


def _entry(path: Path, entries: Mapping[str, TensorEntry], name: str) -> TensorEntry:
    if name not in entries:
        raise UserError(f"{path} holds no tensor {name}")
    return entries[name]


def _map(path: Path, entry: TensorEntry) -> np.ndarray:
    shape = (entry.stored_rows, entry.stride)
    return np.memmap(path, np.uint8, "r", entry.offset, shape)
