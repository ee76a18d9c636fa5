"""The packed file: what is written is read, and damage is refused in one line with nothing left behind."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import relufy
from relufy.engine.pack import pack
from relufy.engine.packed_file import PackedFileWriter, read_header, verify


@pytest.fixture
def packed(make_checkpoint, tmp_path) -> Path:
    return pack(make_checkpoint("stage2"), tmp_path / "model.relufy")


def read_floats(path: Path, name: str) -> np.ndarray:
    entry = read_header(path).tensors[name]
    return np.fromfile(path, np.float32, entry.bytes // 4, offset=entry.offset)


def test_every_layout_holds_the_weights(tmp_path):
    rng = np.random.default_rng(0)
    weight, down = rng.normal(size=(37, 5)).astype(np.float32), rng.normal(size=(5, 37)).astype(np.float32)
    path = tmp_path / "file.relufy"
    with PackedFileWriter(path, {"x": 1.5}, 5) as writer:
        writer.add_blob("blob", b"hello")
        writer.add_rows("rows", weight)
        writer.add_vector("vector", weight[:, 0])
        writer.add_columns("columns", weight)
        writer.add_bundle("bundle", weight, down)
    header = read_header(path)
    assert header.numbers == {"x": 1.5} and header.blob("blob") == b"hello"
    assert all(entry.offset % 64 == 0 for entry in header.tensors.values())
    assert np.array_equal(read_floats(path, "rows").reshape(37, 16)[:, :5], weight)
    assert np.array_equal(read_floats(path, "vector")[:37], weight[:, 0])
    bundle = read_floats(path, "bundle").reshape(37, 2, 16)
    assert np.array_equal(bundle[:, 0, :5], weight) and np.array_equal(bundle[:, 1, :5], down.T)
    assert not bundle[:, :, 5:].any()
    columns = read_floats(path, "columns").reshape(5, 48)
    assert np.array_equal(columns[:, :37], weight.T) and not columns[:, 37:].any()


def test_layouts_follow_what_can_be_skipped(make_checkpoint, tmp_path):
    expected = {
        "dense": {"q": "rows", "gate": "rows", "up": "rows", "down": "rows"},
        "stage1": {"q": "rows", "gate": "rows", "up_down": "bundle"},
        "stage2": {"q": "columns", "gate": "columns", "up_down": "bundle"},
    }
    for recipe, layouts in expected.items():
        described = read_header(pack(make_checkpoint(recipe), tmp_path / recipe)).tensors
        names = ("raw", "vector", "rows", "columns", "bundle")
        mlp = {n.split(".")[2]: names[e.layout] for n, e in described.items() if n.startswith("layers.1.")}
        assert {name: mlp[name] for name in layouts} == layouts
        assert ("up" in mlp) == (recipe == "dense")


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


def damage(folder: Path, tmp_path: Path, edit) -> Path:
    """Return a copy of a checkpoint whose weights were edited."""
    copy = tmp_path / "damaged"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = load_file(copy / "model.safetensors")
    edit(weights)
    save_file(weights, copy / "model.safetensors")
    return copy


def drop(weights):
    del weights["model.layers.1.mlp.up_proj.weight"]


def reshape(weights):
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()


def nan(weights):
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")


def extra(weights):
    weights["model.layers.0.mlp.gate_proj.bias"] = weights["model.norm.weight"].clone()


@pytest.mark.parametrize(
    ("edit", "message"),
    [(drop, "no tensor .*up_proj"), (reshape, "shape"), (nan, "NaN"), (extra, "no place for .*bias")],
    ids=["missing", "shape", "nan", "extra"],
)
def test_bad_checkpoints_are_refused_and_leave_nothing(make_checkpoint, tmp_path, edit, message):
    folder = damage(make_checkpoint("stage1"), tmp_path, edit)
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(relufy.UserError, match=message):
        pack(folder, target / "model.relufy")
    assert list(target.iterdir()) == []


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_a_truncated_checkpoint_is_refused(make_checkpoint, tmp_path, keep):
    folder = damage(make_checkpoint("stage1"), tmp_path, lambda weights: None)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(relufy.UserError, match="truncated or damaged"):
        pack(folder, tmp_path / "model.relufy")
    assert not (tmp_path / "model.relufy").exists()


def test_bfloat16_weights_are_read_exactly(bundled, tmp_path):
    weight = load_file(bundled / "model.safetensors")["model.layers.0.mlp.gate_proj.weight"].float().numpy()
    path = pack(bundled, tmp_path / "bundled.relufy")
    assert np.array_equal(read_floats(path, "layers.0.gate").reshape(512, 192), weight)
