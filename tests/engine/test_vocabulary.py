"""The contract for sparsifiers x dtypes x architectures: equality (a) to (c), bits that depend on nothing."""

from collections.abc import Sequence

import pytest
import torch
from tests.engine.contract import all_at_once, assert_close, bits, hf_logits, in_steps, tokens_of

import relufy
from relufy.activation_sparsity import Sparsifier
from relufy.engine.naive import NaiveDecoder
from relufy.engine.pack import pack

DTYPES = ("f32", "bf16", "int8", "int4")
LENGTH = 40

NEURON = ("neuron",)
INPUTS = (("q", "k", "v"), ("gate", "up"), ("o",), ("down",))


def everywhere(function: str, sites: Sequence[tuple[str, ...]] = INPUTS, **values) -> tuple[Sparsifier, ...]:
    return tuple(Sparsifier(group, function, **values) for group in sites)


GATED = {
    "dense": (),
    "relu": (Sparsifier(NEURON, "relu"),),
    "relu-shifted": (Sparsifier(NEURON, "relu", shift=0.2),),
    "relu2": (Sparsifier(NEURON, "relu2"),),
    "fatrelu": (Sparsifier(NEURON, "fatrelu", threshold=0.3),),
    "drelu": (Sparsifier(NEURON, "drelu"),),
    "statistical-topk": (Sparsifier(NEURON, "statistical_topk", sparsity=0.8),),
    "relu-stage-2": (Sparsifier(NEURON, "relu"), *everywhere("relu", INPUTS[:2])),
    "cats": (Sparsifier(NEURON, "threshold", threshold=0.1),),
    "chess": (
        Sparsifier(NEURON, "threshold", per_channel=("threshold",)),
        Sparsifier(("q",), "threshold", threshold=0.4),
        Sparsifier(("o",), "threshold", threshold=0.1),
    ),
    "neuron-topk": (Sparsifier(NEURON, "topk", k=30),),
    "teal": everywhere("threshold", threshold=0.2),
    "teal-apart": everywhere(
        "threshold", [(site,) for site in ("q", "k", "v", "o", "gate", "up", "down")], threshold=0.25
    ),
    "wina": everywhere("topk", k=30, per_channel=("weight",)),
    "scap": everywhere("threshold", threshold=0.3, per_channel=("centre",)),
    "weighted": everywhere("threshold", per_channel=("threshold", "weight", "centre")),
    "r-sparse": everywhere("threshold", threshold=0.3, correction="low_rank"),
    "relu-and-inputs": (Sparsifier(NEURON, "relu"), *everywhere("threshold", INPUTS[:3], threshold=0.3)),
    "relu-and-down": (Sparsifier(NEURON, "relu"), Sparsifier(("down",), "topk", k=20)),
    "decode-only": everywhere("threshold", threshold=0.4, phase="decode"),
    "first-dense": everywhere("threshold", threshold=0.4, dense_first_tokens=7),
}

PLAIN_INPUTS = (("q", "k", "v"), ("o",), ("up",), ("down",))
PLAIN = {
    "relu": (),
    "relu2": (Sparsifier(NEURON, "relu2"),),
    "stage-2": (Sparsifier(NEURON, "relu"), *everywhere("relu", (("q", "k", "v"), ("up",)))),
    "neuron-topk": (Sparsifier(NEURON, "topk", k=40),),
    "teal": everywhere("threshold", PLAIN_INPUTS[:3], threshold=0.2),
    "first-dense": everywhere("threshold", PLAIN_INPUTS[:3], threshold=0.4, dense_first_tokens=7),
}

CASES = [("llama", name) for name in GATED] + [("opt", name) for name in PLAIN]
SOME = [
    ("llama", "relu-stage-2"),
    ("llama", "teal-apart"),
    ("llama", "wina"),
    ("llama", "drelu"),
    ("opt", "relu"),
]


def block(family: str, name: str) -> tuple[Sparsifier, ...]:
    return (GATED if family == "llama" else PLAIN)[name]


WIDTHS = {
    "llama": {"hidden_size": 96, "intermediate_size": 160},
    "opt": {"hidden_size": 96, "word_embed_proj_dim": 96, "ffn_dim": 160},
}
"""Rows of int4 are in groups of 32; other rows of such a file are int8: sizes like 68 would test none."""


def make_case(make_checkpoint, family: str, name: str, dtype: str = "f32", **config):
    if dtype == "int4":
        config |= WIDTHS[family]
    if family == "opt" and block(family, name):
        config["activation_function"] = "gelu"  # OPT's own ReLU would not be replaced
    return make_checkpoint(family=family, sparsifiers=block(family, name), **config), name


@pytest.fixture(params=CASES, ids="-".join)
def case(request, make_checkpoint):
    """Yield a function that makes the case for a dtype."""
    return lambda dtype="f32": make_case(make_checkpoint, *request.param, dtype)


@pytest.fixture(params=CASES, ids="-".join)
def shallow_case(request, make_checkpoint):
    """Yield a function that makes the case for a dtype: one layer for integer types, else two.

    Rounding an input to 16 bits the other way is a unit of 32512. In one layer few inputs are that near a
    half; in the next all inputs differ a little, and each is rounded anew: 1e-4 after two layers.
    """

    def make(dtype: str):
        layers = 1 if dtype in ("int8", "int4") else 2
        return make_case(make_checkpoint, *request.param, dtype, num_hidden_layers=layers)

    return make


def prompt_length_of(name: str) -> int:
    return 11 if name == "decode-only" else 0


TEXTS = [tokens_of(513, 4, seed)[1:] for seed in range(16)] + [tokens_of(513, LENGTH)]
"""Short ones, because a mask in doubt makes the rest of its text incomparable."""


def check_against_specification(path, name: str, dtype: str) -> None:
    engine, naive, prompt = (
        relufy.Engine(path, threads=2, kv_dtype="f32"),
        NaiveDecoder(path),
        prompt_length_of(name),
    )
    is_integer, compared = dtype in ("int8", "int4"), 0
    for text in TEXTS:
        expected = naive.run(text, prompt)
        found = in_steps(engine, text, 1, prompt)
        cut = 3e-4 if is_integer else 1e-5  # of cuts that are a fifth of the largest score, say
        bound = 2e-4 if is_integer else 1e-4  # a few units where a mask leaves twenty inputs
        compared += assert_close(found, expected.logits, expected.margins, cut, bound)
    assert compared > 20, f"only {compared} positions could be compared"


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_specification(shallow_case, dtype, tmp_path):
    folder, name = shallow_case(dtype)
    check_against_specification(pack(folder, tmp_path / "m", dtype), name, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dense_pack_computes_the_same_model(shallow_case, dtype, tmp_path):
    folder, name = shallow_case(dtype)
    check_against_specification(pack(folder, tmp_path / "m", dtype, for_="dense"), name, dtype)


def test_equals_transformers_in_f32(case, tmp_path):
    folder, name = case()
    if name == "decode-only":
        pytest.skip("transformers has no prompt of a given length in one forward; tests/model shows it")
    path, tokens = pack(folder, tmp_path / "m"), tokens_of(513, LENGTH)
    margins = NaiveDecoder(path).run(tokens).margins
    compared = assert_close(all_at_once(relufy.Engine(path), tokens), hf_logits(folder, tokens), margins)
    assert compared > LENGTH // 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_bits_depend_on_nothing_but_the_tokens(case, dtype, isa, tmp_path, monkeypatch):
    monkeypatch.setenv("RELUFY_ISA", isa)
    folder, name = case(dtype)
    path, tokens, prompt = pack(folder, tmp_path / "m", dtype), tokens_of(513, LENGTH), prompt_length_of(name)
    try:
        reference = bits(in_steps(relufy.Engine(path, threads=1), tokens, 1, prompt))
    except relufy.UserError:
        pytest.skip(f"this processor has no {isa}")
    for threads, skip, size in ((1, False, 1), (2, True, LENGTH), (3, True, 3), (2, False, 17), (3, True, 1)):
        engine = relufy.Engine(path, threads=threads, skip=skip)
        assert bits(in_steps(engine, tokens, size, prompt)) == reference, (threads, skip, size)


@pytest.mark.parametrize("kv_dtype", ["bf16", "f16"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_narrow_kv_cache_stays_close(family, kv_dtype, make_checkpoint, tmp_path):
    path, tokens = pack(make_checkpoint(family=family), tmp_path / "m"), tokens_of(513, LENGTH)
    exact, narrow = (
        torch.tensor(all_at_once(relufy.Engine(path, kv_dtype=t), tokens)) for t in ("f32", kv_dtype)
    )
    divergence = torch.nn.functional.kl_div(
        narrow.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert 0 < divergence.mean() < 1e-3
