"""The packed file: one versioned, memory-mappable file that holds all the engine needs (docs/format.md).

    header    64 bytes: magic, version, CRC-32 of header and tables, sizes, counts
    numbers   64 bytes each: name, float64. The decoder's specification
    tensors   128 bytes each: name, type, layout, shape, stride, offset, bytes
    payload   each tensor at a multiple of 64 bytes; last, a CRC-32 for each MiB before it

This module writes the file and reads what Python needs of it; csrc/packed_file.cpp is the engine's reader.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from relufy.errors import UserError
from relufy.files import replacing

MAGIC = b"RELUFY\x1a\n"
VERSION = 1
ALIGNMENT = 64
PADDING = 16
"""Floats that every stored row is a multiple of, so that no kernel has a tail."""
CHECKED_BYTES = 1 << 20

RAW, VECTOR, ROWS, COLUMNS, BUNDLE = range(5)
LAYOUTS = ("raw", "vector", "rows", "columns", "bundle")
U8, F32 = range(2)
DTYPES = ("u8", "f32")

METADATA = "metadata.json"
CHECKSUMS = "checksums"

_HEADER = struct.Struct("<8sIIQQII24x")
_NUMBER = struct.Struct("<56sd")
_TENSOR = struct.Struct("<64sIIQQQQQ16x")


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's line in the table. `stride` counts floats, `offset` and `bytes` bytes."""

    name: str
    dtype: int
    layout: int
    rows: int
    columns: int
    stride: int
    offset: int
    bytes: int


@dataclass(frozen=True)
class Header:
    """The header and tables of a packed file."""

    path: Path
    file_bytes: int
    numbers: dict[str, float]
    tensors: dict[str, TensorEntry]

    def blob(self, name: str) -> bytes | None:
        """Return the raw bytes stored under a name (metadata, tokenizer files), or None."""
        entry = self.tensors.get(name)
        if entry is None or entry.layout != RAW:
            return None
        with self.path.open("rb") as file:
            file.seek(entry.offset)
            return file.read(entry.bytes)

    def metadata(self) -> dict[str, Any]:
        """Return what the packer wrote about the model: config, recipe, provenance, versions."""
        try:
            return json.loads(self.blob(METADATA) or b"{}")
        except ValueError:
            raise UserError(
                f"{self.path} is damaged: its metadata is not JSON; pack the model again"
            ) from None


def padded(count: int) -> int:
    return -(-count // PADDING) * PADDING


class PackedFileWriter:
    """Writes tensors one after the other, so that packing needs the memory of one tensor. Use as `with`.

    The tables' place is reserved at the start, for `num_tensors` additions; they are filled in at the end.
    """

    def __init__(self, path: Path, numbers: dict[str, float], num_tensors: int):
        self._replacing = replacing(path)
        self._numbers = numbers
        self._entries: list[TensorEntry] = []
        self._num_tensors = num_tensors + 1
        tables = _HEADER.size + _NUMBER.size * len(numbers) + _TENSOR.size * self._num_tensors
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
        self._write(TensorEntry(name, U8, RAW, 1, len(content), len(content), 0, len(content)), content)

    def add_vector(self, name: str, values: np.ndarray) -> None:
        self._add_matrix(name, VECTOR, values[None, :])

    def add_rows(self, name: str, weight: np.ndarray) -> None:
        """Store `[outputs, inputs]` with the weights of one output side by side."""
        self._add_matrix(name, ROWS, weight)

    def add_columns(self, name: str, weight: np.ndarray) -> None:
        """Store `[outputs, inputs]` with the weights of one input side by side."""
        outputs, inputs = weight.shape
        content = _pad_columns(weight.T).astype("<f4").tobytes()
        self._write(
            TensorEntry(name, F32, COLUMNS, outputs, inputs, padded(outputs), 0, len(content)), content
        )

    def add_bundle(self, name: str, up: np.ndarray, down: np.ndarray) -> None:
        """Store up `[neurons, hidden]` and down `[hidden, neurons]` as a row `[up_i | down_i]` per neuron."""
        neurons, hidden = up.shape
        content = np.concatenate([_pad_columns(up), _pad_columns(down.T)], axis=1).astype("<f4").tobytes()
        self._write(TensorEntry(name, F32, BUNDLE, neurons, hidden, padded(hidden), 0, len(content)), content)

    def _add_matrix(self, name: str, layout: int, weight: np.ndarray) -> None:
        rows, columns = weight.shape
        content = _pad_columns(weight).astype("<f4").tobytes()
        self._write(TensorEntry(name, F32, layout, rows, columns, padded(columns), 0, len(content)), content)

    def _write(self, entry: TensorEntry, content: bytes) -> None:
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        placed = TensorEntry(**{**entry.__dict__, "offset": self._file.tell()})
        self._file.write(content)
        self._entries.append(placed)

    def _finish(self) -> None:
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        checksums = b"".join(_checksums(self._file, self._header_bytes, self._file.tell()))
        self._file.seek(0, 2)
        self.add_blob(CHECKSUMS, checksums)
        assert len(self._entries) == self._num_tensors, "the packer announced another number of tensors"
        header = self._header()
        self._file.seek(0)
        self._file.write(header)

    def _header(self) -> bytes:
        counts = (len(self._numbers), len(self._entries))
        sizes = (self._header_bytes, self._file.seek(0, 2))
        tables = b"".join(_NUMBER.pack(_name(name, 56), value) for name, value in self._numbers.items())
        tables += b"".join(
            _TENSOR.pack(_name(e.name, 64), e.dtype, e.layout, e.rows, e.columns, e.stride, e.offset, e.bytes)
            for e in self._entries
        )
        tables = tables.ljust(self._header_bytes - _HEADER.size, b"\0")
        crc = zlib.crc32(tables, zlib.crc32(_HEADER.pack(MAGIC, VERSION, 0, *sizes, *counts)))
        return _HEADER.pack(MAGIC, VERSION, crc, *sizes, *counts) + tables


def is_packed_file(path: Path) -> bool:
    """Tell whether a path is a file that starts as packed files do."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_header(path: Path) -> Header:
    """Read and check header and tables, not the payload. Raises UserError if the file can't be used."""
    if not path.is_file():
        raise UserError(f"there is no packed file {path}")
    with path.open("rb") as file:
        raw = file.read(_HEADER.size)
        if len(raw) < _HEADER.size or raw[: len(MAGIC)] != MAGIC:
            raise UserError(f"{path} is not a packed file of relufy")
        _, version, crc, header_bytes, file_bytes, num_numbers, num_tensors = _HEADER.unpack(raw)
        if version != VERSION:
            raise UserError(
                f"{path} has format version {version}, this relufy reads {VERSION}; pack the model again"
            )
        actual = path.stat().st_size
        if actual != file_bytes:
            raise UserError(f"{path} is truncated or damaged: {actual} bytes where {file_bytes} were written")
        tables = file.read(max(0, min(header_bytes, file_bytes) - _HEADER.size))
    unsigned = _HEADER.pack(MAGIC, VERSION, 0, header_bytes, file_bytes, num_numbers, num_tensors)
    needed = num_numbers * _NUMBER.size + num_tensors * _TENSOR.size
    if len(tables) < needed or zlib.crc32(tables, zlib.crc32(unsigned)) != crc:
        raise UserError(f"{path} is damaged: the checksum of its header does not match; pack the model again")
    numbers = dict(_read_number(tables, i) for i in range(num_numbers))
    entries = [_read_entry(tables, num_numbers * _NUMBER.size, i) for i in range(num_tensors)]
    return Header(path, file_bytes, numbers, {entry.name: entry for entry in entries})


def verify(path: Path) -> int:
    """Check the whole payload against its checksums; return the bytes checked. Raises UserError at damage."""
    header = read_header(path)
    entry = header.tensors.get(CHECKSUMS)
    if entry is None:
        raise UserError(f"{path} is damaged: it holds no checksums; pack the model again")
    stored = header.blob(CHECKSUMS) or b""
    start = min((e.offset for e in header.tensors.values()), default=0)
    with path.open("rb") as file:
        for index, checksum in enumerate(_checksums(file, start, entry.offset)):
            if stored[4 * index : 4 * index + 4] != checksum:
                where = start + index * CHECKED_BYTES
                raise UserError(f"{path} is damaged: the MiB from byte {where} does not match its checksum")
    return entry.offset - start


def _checksums(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    file.seek(start)
    for position in range(start, end, CHECKED_BYTES):
        yield struct.pack("<I", zlib.crc32(file.read(min(CHECKED_BYTES, end - position))))


def _pad_columns(weight: np.ndarray) -> np.ndarray:
    return np.pad(weight, ((0, 0), (0, padded(weight.shape[1]) - weight.shape[1])))


def _name(name: str, capacity: int) -> bytes:
    encoded = name.encode()
    assert len(encoded) < capacity, f"the name {name} is too long for the table"
    return encoded


def _read_number(tables: bytes, index: int) -> tuple[str, float]:
    name, value = _NUMBER.unpack_from(tables, index * _NUMBER.size)
    return _text(name), value


def _read_entry(tables: bytes, start: int, index: int) -> TensorEntry:
    name, *fields = _TENSOR.unpack_from(tables, start + index * _TENSOR.size)
    return TensorEntry(_text(name), *fields)


def _text(name: bytes) -> str:
    return name.split(b"\0")[0].decode("utf-8", "replace")
