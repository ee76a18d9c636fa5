"""Writes a packed file (docs/format.md), one tensor after the other and in blocks of rows.

So packing takes the memory of one tensor of the checkpoint, whatever the size of the model.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from relufy.engine.packed_file import (
    ALIGNMENT,
    BUNDLE,
    CHECKSUMS,
    COLUMNS,
    DTYPES,
    F32,
    HEADER,
    MAGIC,
    NUMBER,
    RAW,
    ROWS,
    SCALES,
    TENSOR,
    U8,
    VECTOR,
    VERSION,
    TensorEntry,
    checksums,
)
from relufy.engine.packed_tensors import StoredMatrix
from relufy.engine.quantize import INTEGER, encode_blocks, row_bytes, row_dtype
from relufy.files import replacing

VECTOR_PADDING = 128
"""Floats that every vector is padded to a multiple of, so that kernels may read whole chunks of any type."""


class PackedFileWriter:
    """Writes numbers and tensors to a new file, atomically. Use as `with`.

    The tables' place is reserved at the start, for `num_tensors` tensors (a vector of scales is one too);
    they are filled in at the end.
    """

    def __init__(self, path: Path, numbers: dict[str, float], num_tensors: int):
        self._replacing = replacing(path)
        self._numbers = numbers
        self._entries: dict[str, TensorEntry] = {}
        self._num_tensors = num_tensors + 1
        tables = HEADER.size + NUMBER.size * len(numbers) + TENSOR.size * self._num_tensors
        self._header_bytes = -(-tables // ALIGNMENT) * ALIGNMENT

    def __enter__(self) -> "PackedFileWriter":
        self._temporary = self._replacing.__enter__()
        self._file: BinaryIO = self._temporary.open("w+b")
        self._file.write(bytes(self._header_bytes))
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                self._finish()
        except BaseException as failure:
            self._file.close()
            self._replacing.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._file.close()
        self._replacing.__exit__(kind, error, trace)

    def add_blob(self, name: str, content: bytes) -> None:
        self._begin(name, U8, RAW, 1, len(content), len(content), len(content))
        self._file.write(content)

    def add_vector(self, name: str, values: np.ndarray) -> None:
        """Store a vector as float32."""
        size = -(-len(values) // VECTOR_PADDING) * VECTOR_PADDING
        content = np.zeros(size, "<f4")
        content[: len(values)] = values
        self._begin(name, F32, VECTOR, 1, len(values), content.nbytes, content.nbytes)
        self._file.write(content.tobytes())

    def add_rows(self, name: str, weight: np.ndarray, dtype: str = "f32") -> None:
        """Store `[outputs, inputs]` with the weights of one output side by side."""
        self._add_matrix(name, ROWS, weight.shape, dtype, {name: weight})

    def add_columns(self, name: str, weight: np.ndarray, dtype: str = "f32") -> None:
        """Store `[outputs, inputs]` with the weights of one input side by side."""
        self._add_matrix(name, COLUMNS, weight.shape, dtype, {name: weight.T})

    def add_bundle(self, name: str, up: np.ndarray, down: np.ndarray, dtype: str = "f32") -> None:
        """Store up `[neurons, hidden]` and down `[hidden, neurons]` as a row `[up_i | down_i]` per neuron.

        The scales of `layers.0.up_down` are those of `layers.0.up` and `layers.0.down`.
        """
        prefix = name.removesuffix("up_down")
        parts = {prefix + "up": up, prefix + "down": down.T}
        self._add_matrix(name, BUNDLE, up.shape, dtype, parts)

    def stored(self, name: str) -> StoredMatrix:
        """Return a matrix that was added, to be read back as the engine will see it."""
        self._file.flush()
        return StoredMatrix.open(self._temporary, self._entries, name)

    def _add_matrix(
        self, name: str, layout: int, shape: Sequence[int], dtype: str, parts: dict[str, np.ndarray]
    ) -> None:
        matrices = list(parts.values())
        stored_rows, count = matrices[0].shape
        dtype = row_dtype(count, dtype)
        stride = row_bytes(count, dtype) * len(matrices)
        self._begin(name, DTYPES.index(dtype), layout, shape[0], shape[1], stride, stride * stored_rows)
        scales: list[list[np.ndarray]] = []
        for raw, block_scales in encode_blocks(matrices, dtype):
            self._file.write(raw.tobytes())
            scales.append(block_scales)
        if dtype in INTEGER:
            for part, blocks in zip(parts, zip(*scales, strict=True), strict=True):
                self.add_vector(part + SCALES, np.concatenate(blocks))

    def _begin(self, name: str, dtype: int, layout: int, rows: int, columns: int, stride: int, size: int):
        """Enter a tensor of `size` bytes into the table; its content is written next."""
        assert name not in self._entries, f"{name} was added twice"
        self._align()
        offset = self._file.tell()
        self._entries[name] = TensorEntry(name, dtype, layout, rows, columns, stride, offset, size)

    def _align(self) -> None:
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))

    def _finish(self) -> None:
        self._align()
        content = b"".join(checksums(self._file, self._header_bytes, self._file.tell()))
        self._file.seek(0, 2)
        self.add_blob(CHECKSUMS, content)
        self._align()  # kernels may read a line beyond a tensor's end, never beyond the file's
        assert len(self._entries) == self._num_tensors, "the packer announced another number of tensors"
        header = self._header()
        self._file.seek(0)
        self._file.write(header)

    def _header(self) -> bytes:
        counts = (len(self._numbers), len(self._entries))
        sizes = (self._header_bytes, self._file.seek(0, 2))
        tables = b"".join(NUMBER.pack(_name(name, 56), value) for name, value in self._numbers.items())
        tables += b"".join(
            TENSOR.pack(_name(e.name, 64), e.dtype, e.layout, e.rows, e.columns, e.stride, e.offset, e.bytes)
            for e in self._entries.values()
        )
        tables = tables.ljust(self._header_bytes - HEADER.size, b"\0")
        crc = zlib.crc32(tables, zlib.crc32(HEADER.pack(MAGIC, VERSION, 0, *sizes, *counts)))
        return HEADER.pack(MAGIC, VERSION, crc, *sizes, *counts) + tables


def _name(name: str, capacity: int) -> bytes:
    encoded = name.encode()
    assert len(encoded) < capacity, f"the name {name} is too long for the table"
    return encoded
