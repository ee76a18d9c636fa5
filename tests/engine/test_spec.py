"""A configuration is expressed in full or refused by name."""

import json

import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import relufy
from relufy.engine.spec import decoder_spec

LLAMA = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
).to_dict()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "opt"}, "opt"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"model_type": "mistral"}, "sliding_window=4096"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"hidden_act": "relufy"}, "activation_sparsity"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"hidden_size": None}, "config.json"),
        ({"num_key_value_heads": 3}, "heads"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "both rope_parameters and rope_scaling"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.0}}, "make no sense"),
        ({"rope_parameters": "abc"}, "config.json"),
        ({"rms_norm_eps": "x"}, "config.json"),
        ({"rms_norm_eps": -1.0}, "norm_eps is -1.0"),
        ({"num_hidden_layers": 1e400}, "config.json"),
        ({"max_position_embeddings": 0}, "max_context is 0"),
        ({"max_position_embeddings": 2**40}, "can't be right"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_engine_lacks_is_refused_by_name(change, named):
    with pytest.raises(relufy.UserError, match=named):
        decoder_spec({**LLAMA, **change})


@pytest.mark.parametrize("sites", [["o"], ["down"], ["q"], ["gate"], ["q", "k"]], ids="-".join)
def test_sites_that_the_engine_can_not_skip_at_are_refused(sites):
    block = {"version": 1, "sparsifiers": [{"sites": sites, "function": "relu"}]}
    with pytest.raises(relufy.UserError, match="engine"):
        decoder_spec({**LLAMA, "activation_sparsity": block})


def test_natively_sparse_models_need_no_block():
    for activation in ("relu", "relu2"):
        spec = decoder_spec({**LLAMA, "hidden_act": activation})
        assert spec.is_sparse() and all(layer.has_sparse_neurons for layer in spec.layers)
    assert not decoder_spec(LLAMA).is_sparse()


def test_sparsifiers_may_differ_between_layers():
    block = {"version": 1, "sparsifiers": [{"sites": ["neuron"], "function": "relu", "layers": [1]}]}
    spec = decoder_spec({**LLAMA, "activation_sparsity": block})
    assert [(s.activation, s.has_sparse_neurons) for s in spec.layers] == [("silu", False), ("relu", True)]


ROPE = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("kind", ROPE)
def test_rotary_frequencies_equal_those_of_transformers(kind):
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=ROPE[kind])
    expected = LlamaRotaryEmbedding(config).inv_freq.tolist()
    assert decoder_spec(json.loads(config.to_json_string(use_diff=False))).rope_frequencies == pytest.approx(
        expected, rel=1e-6
    )
