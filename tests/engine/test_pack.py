"""Packing: the layout follows what can be skipped, and what can't be packed is refused, leaving nothing."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import relufy
from relufy.activation_sparsity import Sparsifier
from relufy.engine.pack import pack
from relufy.engine.packed_file import DTYPES, LAYOUTS, RAW, VECTOR, Header, read_header, verify
from relufy.engine.packed_tensors import PackedTensors

NEURON = Sparsifier(("neuron",), "relu")
MASKS = tuple(Sparsifier((s,), "threshold", threshold=0.2) for s in ("q", "k", "o", "gate", "up", "down"))

LAYOUTS_OF = {
    "dense": ("llama", (), {}),
    "stage1": ("llama", (NEURON,), {"up_down": "bundle"}),
    "stage2": (
        "llama",
        (NEURON, Sparsifier(("q", "k", "v"), "relu"), Sparsifier(("gate", "up"), "relu")),
        {"q": "columns", "k": "columns", "v": "columns", "gate": "columns", "up_down": "bundle"},
    ),
    "inputs": ("llama", MASKS, dict.fromkeys(("q", "k", "o", "gate", "up", "down"), "columns")),
    "both": (
        "llama",
        (*MASKS, NEURON),
        {**dict.fromkeys(("q", "k", "o", "gate"), "columns"), "up_down": "bundle"},
    ),
    "corrected": (
        "llama",
        (NEURON, Sparsifier(("down",), "topk", k=9, correction="low_rank")),
        {"down": "columns"},
    ),
    "opt": ("opt", (), {"down": "columns"}),
    "opt-inputs": (
        "opt",
        (NEURON, Sparsifier(("up",), "relu"), Sparsifier(("v",), "topk", k=9)),
        {"v": "columns", "up": "columns", "down": "columns"},
    ),
}


def matrices(header: Header, prefix: str = "layers.1.") -> dict[str, str]:
    """Return the layout of each matrix of a layer."""
    entries = [e for e in header.tensors.values() if e.name.startswith(prefix)]
    names = {e.name.removeprefix(prefix): e.layout for e in entries if e.layout not in (RAW, VECTOR)}
    return {name: LAYOUTS[layout] for name, layout in names.items() if "." not in name}


@pytest.mark.parametrize("case", LAYOUTS_OF)
def test_layouts_follow_what_can_be_skipped(case, make_checkpoint, tmp_path):
    family, sparsifiers, special = LAYOUTS_OF[case]
    folder = make_checkpoint(family=family, sparsifiers=sparsifiers)
    names = ("q", "k", "v", "o", *(("gate",) if family == "llama" else ()), "up", "down")
    every = dict.fromkeys(names, "rows")
    dense = read_header(pack(folder, tmp_path / "dense", for_="dense"))
    assert matrices(dense) == every
    expected = every | special
    if "up_down" in special:
        del expected["up"], expected["down"]
    exact = read_header(pack(folder, tmp_path / "exact"))
    assert matrices(exact) == expected
    assert exact.numbers == dense.numbers
    if case in ("dense", "inputs", "corrected"):
        with pytest.raises(relufy.UserError, match="can't be reused"):
            pack(folder, tmp_path / "reuse", for_="reuse")
        return
    reuse = read_header(pack(folder, tmp_path / "reuse", for_="reuse"))
    assert matrices(reuse) == expected | {"gate" if family == "llama" else "up": "rows"}


def test_types_of_an_int4_file(make_checkpoint, tmp_path):
    mask = Sparsifier(("o",), "threshold", threshold=0.1, correction="low_rank")
    folder = make_checkpoint(sparsifiers=(NEURON, mask), hidden_size=96)
    header = read_header(pack(folder, tmp_path / "m", "int4"))
    types = {e.name: DTYPES[e.dtype] for e in header.tensors.values() if e.layout not in (RAW, VECTOR)}
    assert types["embedding"] == types["head"] == "int8"
    assert types["layers.0.o.low_rank_in"] == types["layers.1.o.low_rank_out"] == "bf16"
    assert types["layers.0.q"] == types["layers.1.up_down"] == "int4"
    odd = read_header(pack(make_checkpoint(), tmp_path / "odd", "int4"))  # groups of 32 do not divide 68
    assert DTYPES[odd.tensors["layers.0.q"].dtype] == "int8"
    vectors = [e for e in header.tensors.values() if e.layout == VECTOR]
    assert all(DTYPES[e.dtype] == "f32" and e.stride == e.bytes and e.bytes % 512 == 0 for e in vectors)
    scales = {name for name in header.tensors if name.endswith(".scales")}
    assert {"layers.0.up.scales", "layers.0.down.scales", "head.scales"} <= scales
    assert len(scales) == 2 + 2 * 7  # embedding and head; two layers of q k v o gate up down


def test_numbers_and_vectors_of_masks(make_checkpoint, tmp_path):
    masks = (
        Sparsifier(("q", "k", "v"), "topk", k=7, per_channel=("weight",), phase="decode"),
        Sparsifier(("gate",), "threshold", threshold=0.25, dense_first_tokens=2),
        Sparsifier(("up",), "threshold", threshold=0.25, dense_first_tokens=2),
        Sparsifier(("down",), "threshold", per_channel=("threshold", "centre"), layers=(1,)),
        Sparsifier(("neuron",), "statistical_topk", sparsity=0.9),
    )
    folder = make_checkpoint(sparsifiers=masks)
    tensors = PackedTensors(pack(folder, tmp_path / "m"))
    numbers, stored = tensors.header.numbers, load_file(folder / "model.safetensors")
    assert {
        n: numbers[f"layers.0.k.{n}"] for n in ("select", "k", "decode_only", "dense_first", "shares_q")
    } == {
        "select": 3.0,
        "k": 7.0,
        "decode_only": 1.0,
        "dense_first": 0.0,
        "shares_q": 1.0,
    }
    assert numbers["layers.0.gate.threshold"] == 0.25 and numbers["layers.0.up.shares_gate"] == 1
    assert numbers["layers.1.gate.dense_first"] == 2
    assert "layers.0.down.select" not in numbers and "layers.0.o.select" not in numbers
    assert numbers["layers.1.statistical"] == 1
    assert numbers["layers.1.deviations"] == pytest.approx(1.2815515655)
    weight = stored["model.layers.1.input_layernorm.sparsifier.weight"]
    assert all(np.array_equal(tensors.vector(f"layers.1.{s}.weight"), weight) for s in "qkv")
    thresholds = stored["model.layers.1.mlp.down_proj.sparsifier.threshold"]
    assert np.array_equal(tensors.vector("layers.1.down.thresholds"), thresholds)
    bias = (
        stored["model.layers.1.mlp.down_proj.weight"]
        @ stored["model.layers.1.mlp.down_proj.sparsifier.centre"]
    )
    assert np.allclose(tensors.vector("layers.1.down.bias"), bias, rtol=1e-4, atol=1e-5)


def test_masks_with_tensors_of_their_own_are_not_shared(make_checkpoint, tmp_path):
    masks = tuple(Sparsifier((s,), "topk", k=7, per_channel=("weight",)) for s in ("q", "k"))
    numbers = read_header(pack(make_checkpoint(sparsifiers=masks), tmp_path / "m")).numbers
    assert numbers["layers.0.k.select"] == 3 and "layers.0.k.shares_q" not in numbers


def test_positions_of_opt_begin_at_zero(make_checkpoint, tmp_path):
    folder = make_checkpoint(family="opt")
    tensors = PackedTensors(pack(folder, tmp_path / "m", "int4"))
    table = load_file(folder / "model.safetensors")["model.decoder.embed_positions.weight"].numpy()
    assert np.array_equal(tensors.matrix("position_embedding").weight(), table[2:])
    assert "rope_frequencies" not in tensors


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("for_", ["exact", "dense"])
def test_every_type_is_packed_whole(dtype, for_, make_checkpoint, tmp_path):
    steps = []
    path = pack(make_checkpoint("stage2"), tmp_path / "m", dtype, for_, lambda *at: steps.append(at))
    assert verify(path) > 0
    assert steps == [(i, len(steps)) for i in range(1, len(steps) + 1)]
    metadata = read_header(path).metadata()
    assert (metadata["dtype"], metadata["for"]) == (dtype, for_)


def test_wide_rows_take_the_bits_that_the_type_promises(make_checkpoint, tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 1024, "head_dim": 128, "vocab_size": 259}
    folder = make_checkpoint("stage1", num_attention_heads=8, **sizes)
    bits = {d: read_header(pack(folder, tmp_path / d, d)).bits_per_weight() for d in ("f32", "bf16", "int8")}
    assert bits == pytest.approx({"f32": 32, "bf16": 16, "int8": 8.05}, abs=0.1)
    header = read_header(pack(folder, tmp_path / "int4", "int4"))
    layer = [e for e in header.tensors.values() if e.name == "layers.0.up_down"]
    assert 8 * layer[0].bytes / layer[0].parameters == 4.5  # 32 bytes of k take a line of 64


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"dtype": "int5"}, "int5.*did you mean 'int"),
        ({"for_": "reuse"}, "neurons have no zeros: relufy it first"),
        ({"for_": "exakt"}, "did you mean 'exact'"),
    ],
    ids=str,
)
def test_unknown_choices_are_refused(choice, message, make_checkpoint, tmp_path):
    with pytest.raises(relufy.UserError, match=message):
        pack(make_checkpoint(), tmp_path / "m", **choice)
    assert list(tmp_path.iterdir()) == []


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
    for dtype in ("f32", "bf16"):
        tensors = PackedTensors(pack(bundled, tmp_path / dtype, dtype))
        assert np.array_equal(tensors.matrix("layers.0.gate").weight(), weight)
