"""The engine's specification computes what transformers does, for every family, sparsifier and type."""

import numpy as np
import pytest
import torch

import relufy
from relufy.activation_sparsity import Sparsifier
from relufy.engine.naive import NaiveDecoder
from relufy.engine.naive_masks import RELU, THRESHOLD, TOPK, keep
from relufy.engine.pack import pack
from relufy.engine.quantize import DTYPES

NEURON = Sparsifier(("neuron",), "relu")
QKV, GATE_UP, ALL = ("q", "k", "v"), ("gate", "up"), ("threshold", "weight", "centre")

GATED = {
    "dense": (),
    "shifted-relu": (Sparsifier(("neuron",), "relu", shift=0.1),),
    "relu2": (Sparsifier(("neuron",), "relu2", shift=0.1),),
    "helu": (Sparsifier(("neuron",), "helu"),),
    "fatrelu": (Sparsifier(("neuron",), "fatrelu", threshold=0.2),),
    "drelu": (Sparsifier(("neuron",), "drelu"),),
    "statistical": (Sparsifier(("neuron",), "statistical_topk", sparsity=0.7),),
    "cats": (Sparsifier(("neuron",), "threshold", threshold=0.2),),
    "chess": (Sparsifier(("neuron",), "threshold", per_channel=("threshold",)),),
    "neuron-topk": (Sparsifier(("neuron",), "topk", k=60, per_channel=("weight",)),),
    "stage2": (NEURON, Sparsifier(QKV, "relu"), Sparsifier(GATE_UP, "relu")),
    "teal": tuple(Sparsifier((s,), "threshold", threshold=0.4) for s in (*QKV, "o", *GATE_UP, "down")),
    "wina": tuple(
        Sparsifier((s,), "topk", k=30, per_channel=("weight",)) for s in (*QKV, "o", *GATE_UP, "down")
    ),
    "shared-centre": (
        NEURON,
        Sparsifier(QKV, "threshold", per_channel=ALL),
        Sparsifier(GATE_UP, "topk", k=25, per_channel=("centre",)),
        Sparsifier(("o", "down"), "threshold", threshold=0.3, per_channel=("centre", "weight")),
    ),
    "r-sparse": tuple(
        Sparsifier(sites, "threshold", threshold=0.5, correction="low_rank")
        for sites in (QKV, GATE_UP, ("o",), ("down",))
    ),
    "decode-only": (
        Sparsifier(QKV, "threshold", threshold=0.7, phase="decode"),
        Sparsifier(("neuron",), "topk", k=50, phase="decode"),
        Sparsifier(("down",), "topk", k=50, per_channel=("centre",), phase="decode"),
    ),
    "dense-first": (
        Sparsifier(QKV, "threshold", threshold=0.7, dense_first_tokens=3),
        Sparsifier(("o",), "topk", k=5, per_channel=("centre",), dense_first_tokens=4),
    ),
    "some-layers": (Sparsifier(("o", "down"), "threshold", threshold=0.3, layers=(1,)),),
}
PLAIN = {
    "native": (),
    "stage2": (NEURON, Sparsifier(QKV, "relu"), Sparsifier(("up",), "relu")),
    "masks": (
        NEURON,
        Sparsifier(QKV, "threshold", per_channel=ALL),
        Sparsifier(("up",), "topk", k=25, per_channel=("centre",)),
        Sparsifier(("o",), "threshold", threshold=0.3, correction="low_rank"),
    ),
}
GELU = {
    "dense": (),
    "down": (Sparsifier(("down",), "topk", k=40, per_channel=("weight", "centre")),),
    "neuron": (Sparsifier(("neuron",), "threshold", per_channel=("threshold",)),),
}
TOKENS = [0, *np.random.default_rng(0).integers(2, 513, 40).tolist()]


def hf_logits(folder, prompt: int = 0) -> np.ndarray:
    """Return transformers' logits: the prompt at once, what follows token by token."""
    model, parts = relufy.load_model(folder), [TOKENS[:prompt]] + [[t] for t in TOKENS[prompt:]]
    if not prompt:
        parts = [TOKENS]
    cache, found = None, []
    with torch.inference_mode():
        for part in parts:
            output = model(input_ids=torch.tensor([part]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits[0].double().numpy())
    return np.concatenate(found)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the worst ||a - b|| / ||b|| over positions."""
    return (np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)).max()


CASES = [("llama", name) for name in GATED] + [("opt", name) for name in PLAIN]


@pytest.fixture
def folder(request, make_checkpoint):
    family, name = request.param
    return make_checkpoint(family=family, sparsifiers=(GATED if family == "llama" else PLAIN)[name])


@pytest.mark.parametrize("for_", ["exact", "dense"])
@pytest.mark.parametrize("folder", CASES, indirect=True, ids="-".join)
def test_equals_transformers(folder, for_, request, tmp_path):
    prompt = 20 if "decode-only" in request.node.callspec.id else 0
    naive = NaiveDecoder(pack(folder, tmp_path / "m.relufy", for_=for_))
    assert error(naive.logits(TOKENS, prompt), hf_logits(folder, prompt)) < 1e-5


def test_gates_packed_for_reuse_read_masked_inputs(make_checkpoint, tmp_path):
    folder = make_checkpoint(sparsifiers=GATED["stage2"])
    naive = NaiveDecoder(pack(folder, tmp_path / "m.relufy", for_="reuse"))
    assert error(naive.logits(TOKENS), hf_logits(folder, 0)) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [{"enable_bias": False}, {"activation_function": "gelu"}, {"activation_function": "gelu_new"}],
    ids=str,
)
@pytest.mark.parametrize("name", GELU)
def test_opts_without_relu_equal_transformers(changes, name, make_checkpoint, tmp_path):
    changes = {"activation_function": "gelu"} | changes
    folder = make_checkpoint(family="opt", sparsifiers=GELU[name], **changes)
    naive = NaiveDecoder(pack(folder, tmp_path / "m.relufy"))
    assert error(naive.logits(TOKENS), hf_logits(folder)) < 1e-5


def test_llamas_with_biases_equal_transformers(make_checkpoint, tmp_path):
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 18}
    folder = make_checkpoint("stage2", attention_bias=True, mlp_bias=True, **sizes)
    naive = NaiveDecoder(pack(folder, tmp_path / "m.relufy"))
    assert error(naive.logits(TOKENS), hf_logits(folder)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "folder", [("llama", "shifted-relu"), ("llama", "stage2"), ("opt", "native")], indirect=True
)
def test_rounding_inputs_to_16_bits_changes_little(folder, dtype, tmp_path):
    path = pack(folder, tmp_path / "m.relufy", dtype)
    exact = NaiveDecoder(path, emulate=False).logits(TOKENS[:12])
    emulated = NaiveDecoder(path).logits(TOKENS[:12])
    difference = error(emulated, exact)
    assert (0 < difference < 5e-3) if dtype in ("int8", "int4") else difference == 0


def test_a_centre_is_folded_with_the_weights_as_they_are_stored(make_checkpoint, tmp_path):
    """With thresholds that keep everything, centres change nothing, at any precision of the weights."""
    masks = tuple(
        Sparsifier((s,), "threshold", threshold=0.0, per_channel=("centre",))
        for s in (*QKV, "o", "gate", "down")
    )
    plain = pack(make_checkpoint(), tmp_path / "plain", "int4", "dense")
    centred = pack(make_checkpoint(sparsifiers=masks), tmp_path / "centred", "int4", "dense")
    found, expected = (NaiveDecoder(path, emulate=False).logits(TOKENS[:8]) for path in (centred, plain))
    assert error(found, expected) < 1e-6


def test_masks():
    x = np.array([[3.0, -1.0, 1.0, 0.0, -3.0]])
    assert keep(x, RELU, 0).tolist() == [[True, False, True, False, False]]
    assert keep(x, THRESHOLD, 0, 1.0).tolist() == [[True, True, True, False, True]]
    assert keep(x, THRESHOLD, 0, 1.0, weight=np.array([0.1, 1, 2, 9, 1])).tolist() == [
        [False, True, True, False, True]
    ]
    assert keep(x, THRESHOLD, 0, 1.0, centre=1.0).tolist() == [[True, True, False, True, True]]
    assert keep(x, TOPK, 3).tolist() == [[True, True, False, False, True]]
    assert keep(x, 0, 0).all()
