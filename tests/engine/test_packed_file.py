"""The packed file: what is written is read, and damage is refused in one line with nothing left behind."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

import relufy
from relufy.engine.pack import pack
from relufy.engine.packed_file import RAW, read_header, verify
from relufy.engine.packed_tensors import PackedTensors
from relufy.engine.packed_writer import PackedFileWriter
from relufy.engine.quantize import DTYPES, INTEGER, decode, encode, row_dtype


@pytest.fixture
def packed(make_checkpoint, tmp_path) -> Path:
    return pack(make_checkpoint("stage2"), tmp_path / "model.relufy")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(37, 5), (5, 37), (1, 1), (130, 257), (96, 160)], ids=str)
def test_every_layout_holds_the_weights(dtype, shape, tmp_path):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=shape).astype(np.float32)
    down = rng.normal(size=shape[::-1]).astype(np.float32)
    path = tmp_path / "file.relufy"
    scales = 4 if dtype in INTEGER else 0
    with PackedFileWriter(path, {"x": 1.5}, 5 + scales) as writer:
        writer.add_blob("blob", b"hello")
        writer.add_rows("rows", weight, dtype)
        writer.add_vector("vector", weight[:, 0])
        writer.add_columns("columns", weight, dtype)
        writer.add_bundle("layers.0.up_down", weight, down, dtype)
    tensors = PackedTensors(path)
    header = tensors.header
    assert header.numbers == {"x": 1.5} and header.blob("blob") == b"hello"
    assert all(entry.offset % 64 == 0 for entry in header.tensors.values())
    assert all(e.stride % 64 == 0 for e in header.tensors.values() if e.layout != RAW)
    assert np.array_equal(tensors.vector("vector"), weight[:, 0])
    stored, by_input, of_down = (_read_back(part, dtype) for part in (weight, weight.T, down.T))
    assert np.array_equal(tensors.matrix("rows").weight(), stored)
    assert np.array_equal(tensors.matrix("columns").weight(), by_input.T)
    assert np.array_equal(tensors.matrix("layers.0.up").weight(), stored)
    assert np.array_equal(tensors.matrix("layers.0.down").weight(), of_down.T)
    x = rng.normal(size=(3, shape[1]))
    for name in ("rows", "columns", "layers.0.up"):
        assert np.allclose(tensors.matrix(name).times(x), x @ tensors.matrix(name).weight().T.astype(float))
    assert header.parameters() == 4 * weight.size + len(weight)


def _read_back(values: np.ndarray, dtype: str) -> np.ndarray:
    dtype = row_dtype(values.shape[1], dtype)
    encoded = encode(values, dtype)
    return decode(encoded.raw, dtype, values.shape[1], encoded.scales)


def test_the_bytes_of_a_small_file(tmp_path):
    """One int8 matrix by input: its record, its two stored rows, and its vector of scales."""
    path = tmp_path / "file.relufy"
    with PackedFileWriter(path, {"a": 2.0}, 2) as writer:
        writer.add_columns("w", np.array([[127, 0], [-127, 254], [1, 0]], np.float32), "int8")
    content = path.read_bytes()
    assert content[:12] == b"RELUFY\x1a\n" + struct.pack("<I", 2)
    header_bytes, file_bytes, numbers, tensors = struct.unpack_from("<QQII", content, 16)
    assert (header_bytes, file_bytes, numbers, tensors) == (512, len(content), 1, 3)
    assert content[64:128] == b"a".ljust(56, b"\0") + struct.pack("<d", 2.0)
    int8, columns, f32, vector = 3, 3, 1, 1
    assert content[128:256] == _record("w", int8, columns, 3, 2, 64, 512, 128)
    assert content[256:384] == _record("w.scales", f32, vector, 1, 2, 512, 640, 512)
    assert content[384:512] == _record("checksums", 0, 0, 1, 4, 4, 1152, 4)
    rows = np.frombuffer(content, np.uint8, 128, 512).reshape(2, 64)
    assert rows[0, :5].tolist() == [255, 1, 129, 128, 128]
    assert rows[1, :5].tolist() == [128, 255, 128, 128, 128]
    scales = np.frombuffer(content, "<f4", 128, 640)
    assert scales[:2].tolist() == [1.0, 2.0] and not scales[2:].any()
    assert content[1152:] == struct.pack("<I", zlib.crc32(content[512:1152])).ljust(64, b"\0")


def _record(name: str, dtype: int, layout: int, *sizes: int) -> bytes:
    return name.encode().ljust(64, b"\0") + struct.pack("<II5Q16x", dtype, layout, *sizes)


def test_verify_finds_any_flipped_bit(packed):
    checked = verify(packed)
    content = bytearray(packed.read_bytes())
    assert checked > 0.9 * len(content)
    header_bytes = min(entry.offset for entry in read_header(packed).tensors.values())
    for at in np.random.default_rng(0).integers(header_bytes, header_bytes + checked, 20):
        damaged = content.copy()
        damaged[at] ^= 1
        packed.write_bytes(damaged)
        with pytest.raises(relufy.UserError, match="checksum"):
            verify(packed)
        assert relufy.Engine(packed).generate("a", max_new_tokens=3).run().stats is not None


@pytest.mark.parametrize("open_it", [relufy.Engine, verify, relufy.info], ids=["Engine", "verify", "info"])
@pytest.mark.parametrize("keep", [0, 5, 63, 64, 1000, -1], ids=lambda k: f"keep{k}")
def test_a_truncated_file_is_refused(packed, keep, open_it):
    packed.write_bytes(packed.read_bytes()[:keep])
    with pytest.raises(relufy.UserError, match=r"truncated|not a packed file|neither"):
        open_it(packed)


def test_another_version_is_refused_by_name(packed):
    content = bytearray(packed.read_bytes())
    struct.pack_into("<I", content, 8, 99)
    packed.write_bytes(content)
    for open_it in (relufy.Engine, verify, relufy.info):
        with pytest.raises(relufy.UserError, match=r"version 99.*pack the model again"):
            open_it(packed)


def test_a_damaged_header_is_refused(packed):
    content = bytearray(packed.read_bytes())
    content[80] ^= 0xFF
    packed.write_bytes(content)
    for open_it in (relufy.Engine, verify, relufy.info):
        with pytest.raises(relufy.UserError, match="checksum of its header"):
            open_it(packed)


def with_numbers(path: Path, **changes: float) -> None:
    """Alter numbers of the specification and make the header's checksum right again."""
    content = bytearray(path.read_bytes())
    header_bytes, _, num_numbers, _ = struct.unpack_from("<QQII", content, 16)
    for i in range(num_numbers):
        name = content[64 + 64 * i :][:56].rstrip(b"\0").decode()
        if name in changes:
            struct.pack_into("<d", content, 64 + 64 * i + 56, changes[name])
    struct.pack_into("<I", content, 12, 0)
    struct.pack_into("<I", content, 12, zlib.crc32(content[:header_bytes]))
    path.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 3.0},
        {"num_layers": 1e30},
        {"hidden_size": 64.0},
        {"head_dim": 21.0},
        {"num_kv_heads": 2.0},
        {"vocab_size": float("nan")},
        {"neurons_per_partition": 8.0},
        {"layers.0.activation": 17.0},
    ],
    ids=str,
)
def test_a_specification_that_contradicts_the_tensors_is_refused(packed, change):
    with_numbers(packed, **change)
    with pytest.raises(relufy.UserError, match="damaged"):
        relufy.Engine(packed)
