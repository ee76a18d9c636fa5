"""The block is read strictly: a field belongs to its functions, and what cannot be is refused in one line."""

import json
from typing import Any

import pytest

from relufy.activation_sparsity import (
    ActivationSparsity,
    Sparsifier,
    activation_name,
    read_activation_sparsity,
)
from relufy.errors import UserError

NEURON, Q = ("neuron",), ("q",)

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no_site": ({"sites": [], "function": "relu"}, "names no site"),
    "unknown_site": ({"sites": ["gat"], "function": "relu"}, "did you mean 'gate'"),
    "unknown_function": ({"sites": Q, "function": "treshold"}, "did you mean 'threshold'"),
    "unknown_key": ({"sites": Q, "function": "topk", "kk": 3}, "unknown key 'kk'"),
    "activation_at_input": ({"sites": Q, "function": "drelu"}, "goes to the site 'neuron', not 'q'"),
    "shift_of_a_selection": (
        {"sites": NEURON, "function": "topk", "k": 2, "shift": 1},
        "shift belongs to relu",
    ),
    "shift_at_input": ({"sites": Q, "function": "relu", "shift": 1}, "for the site 'neuron' alone"),
    "shift_infinite": (
        {"sites": NEURON, "function": "relu", "shift": float("inf")},
        "shift must be a finite",
    ),
    "width_of_relu": ({"sites": NEURON, "function": "relu", "width": 0.1}, "width belongs to helu; relu has"),
    "width_negative": ({"sites": NEURON, "function": "helu", "width": -0.1}, "width must be a finite number"),
    "threshold_of_relu": ({"sites": Q, "function": "relu", "threshold": 0.1}, "threshold belongs to fatrelu"),
    "threshold_missing": ({"sites": Q, "function": "threshold"}, "threshold needs 'threshold', or"),
    "threshold_twice": (
        {"sites": Q, "function": "threshold", "threshold": 0.1, "per_channel": ["threshold"]},
        "not both",
    ),
    "threshold_negative": (
        {"sites": Q, "function": "threshold", "threshold": -0.1},
        "0 or greater, found -0.1",
    ),
    "threshold_nan": ({"sites": Q, "function": "threshold", "threshold": float("nan")}, "finite number"),
    "threshold_word": ({"sites": Q, "function": "threshold", "threshold": "big"}, "expected float"),
    "fatrelu_without": ({"sites": NEURON, "function": "fatrelu"}, "fatrelu needs 'threshold'$"),
    "k_missing": ({"sites": Q, "function": "topk"}, "topk needs 'k'"),
    "k_zero": ({"sites": Q, "function": "topk", "k": 0}, "k must be at least 1"),
    "k_of_threshold": ({"sites": Q, "function": "threshold", "threshold": 0, "k": 1}, "k belongs to topk"),
    "sparsity_missing": ({"sites": NEURON, "function": "statistical_topk"}, "needs 'sparsity'"),
    "sparsity_one": (
        {"sites": NEURON, "function": "statistical_topk", "sparsity": 1.0},
        "between 0 and 1, found 1.0",
    ),
    "topk_thresholds": (
        {"sites": Q, "function": "topk", "k": 1, "per_channel": ["threshold"]},
        "topk has no thresholds",
    ),
    "per_channel_unknown": (
        {"sites": Q, "function": "topk", "k": 1, "per_channel": ["center"]},
        "did you mean 'centre'",
    ),
    "per_channel_twice": (
        {"sites": Q, "function": "topk", "k": 1, "per_channel": ["weight", "weight"]},
        "names a tensor twice",
    ),
    "per_channel_of_relu": (
        {"sites": Q, "function": "relu", "per_channel": ["weight"]},
        "per_channel belongs",
    ),
    "centre_at_neuron": (
        {"sites": NEURON, "function": "topk", "k": 1, "per_channel": ["centre"]},
        "no centre at the site 'neuron'",
    ),
    "correction_at_neuron": (
        {"sites": NEURON, "function": "topk", "k": 1, "correction": "low_rank"},
        "a correction needs the input of projections",
    ),
    "correction_of_relu2": (
        {"sites": Q, "function": "relu2", "correction": "low_rank"},
        "correction belongs",
    ),
    "correction_unknown": (
        {"sites": Q, "function": "topk", "k": 1, "correction": "lowrank"},
        "unknown correction 'lowrank'",
    ),
    "phase_unknown": ({"sites": Q, "function": "relu", "phase": "prefill"}, "unknown phase 'prefill'"),
    "phase_of_fatrelu": (
        {"sites": NEURON, "function": "fatrelu", "threshold": 0.1, "phase": "decode"},
        "phase belongs to relu",
    ),
    "phase_at_neuron": ({"sites": NEURON, "function": "relu", "phase": "decode"}, "acts on every token"),
    "first_tokens_at_neuron": (
        {"sites": ["neuron", "q"], "function": "relu", "dense_first_tokens": 4},
        "acts on every token",
    ),
    "first_tokens_negative": ({"sites": Q, "function": "relu", "dense_first_tokens": -1}, "0 or greater"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(case: str) -> None:
    entry, message = REFUSED[case]
    config = {"activation_sparsity": {"version": 1, "sparsifiers": [entry]}}
    with pytest.raises(UserError, match=message) as refusal:
        read_activation_sparsity(config)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith("config.json: activation_sparsity.sparsifiers[0]")


ACCEPTED = [
    Sparsifier(NEURON, "relu"),
    Sparsifier(NEURON, "relu2", 0.5),
    Sparsifier(NEURON, "helu", 0.1),
    Sparsifier(NEURON, "fatrelu", threshold=0.01),
    Sparsifier(NEURON, "drelu"),
    Sparsifier(NEURON, "statistical_topk", sparsity=0.95, layers=(0, 1)),
    Sparsifier(NEURON, "threshold", threshold=0.0),
    Sparsifier(NEURON, "threshold", per_channel=("threshold",), phase="decode"),
    Sparsifier(("q", "k", "v"), "relu", dense_first_tokens=4),
    Sparsifier(("q", "o", "down"), "topk", k=7, per_channel=("weight", "centre")),
    Sparsifier(Q, "threshold", per_channel=("threshold", "weight"), correction="low_rank", phase="decode"),
]


@pytest.mark.parametrize("sparsifier", ACCEPTED, ids=lambda s: f"{s.function}-{'-'.join(s.sites)}")
def test_a_block_is_what_it_was_after_json(sparsifier: Sparsifier) -> None:
    block = json.loads(json.dumps(ActivationSparsity((sparsifier,), activation="silu").to_block()))
    assert read_activation_sparsity({"activation_sparsity": block}).sparsifiers == (sparsifier,)


def test_the_block_leaves_out_defaults() -> None:
    sparsity = ActivationSparsity((Sparsifier(Q, "topk", k=3), Sparsifier(NEURON, "relu")))
    assert sparsity.to_block() == {
        "version": 1,
        "sparsifiers": [
            {"sites": ["q"], "function": "topk", "k": 3},
            {"sites": ["neuron"], "function": "relu"},
        ],
        "recipe": {},
        "provenance": {},
    }


def test_blocks_of_before_are_read_as_before() -> None:
    entry = {"sites": ["neuron"], "function": "relu", "shift": 0.0}
    config = {"hidden_act": "relu", "activation_sparsity": {"version": 1, "sparsifiers": [entry]}}
    assert read_activation_sparsity(config).at("neuron", 3) == Sparsifier(NEURON, "relu")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"hidden_act": "relu"}, Sparsifier(NEURON, "relu")),
        ({"hidden_act": "relu2"}, Sparsifier(NEURON, "relu2")),
        ({"hidden_act": "relu_squared"}, Sparsifier(NEURON, "relu2")),
        ({"activation_function": "relu_2"}, Sparsifier(NEURON, "relu2")),
        ({"hidden_act": "fatrelu", "hidden_act_param": 0.01}, Sparsifier(NEURON, "fatrelu", threshold=0.01)),
        ({"hidden_act": "silu"}, None),
    ],
)
def test_models_sparse_by_nature_are_recognised(config: dict, expected: Sparsifier | None) -> None:
    assert read_activation_sparsity(config).at("neuron", 0) == expected


def test_a_fatrelu_without_its_threshold_is_refused() -> None:
    with pytest.raises(UserError, match="threshold as a number in 'hidden_act_param'"):
        read_activation_sparsity({"hidden_act": "fatrelu"})


def test_the_models_own_activation_is_named_through_the_block() -> None:
    assert activation_name({"hidden_act": "relufy", "activation_sparsity": {"activation": "silu"}}) == "silu"
    assert activation_name({"hidden_act": "relufy", "activation_sparsity": {}}) == "relufy"
    assert activation_name({"hidden_act": "gelu", "activation_sparsity": {"activation": "silu"}}) == "gelu"
