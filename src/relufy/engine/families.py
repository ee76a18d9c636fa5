"""The model families of the engine, as data: what a config.json means, and how the weights are called.

A family is one entry of FAMILIES. Settings that the canonical decoder (spec.py) can't express are listed with
the value that they must have.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Must:
    """A setting that must have one value; `default` is what it is where a configuration does not say."""

    be: Any
    default: Any


@dataclass(frozen=True)
class Family:
    """How one `model_type` is read.

    `keys` gives the configuration's name for each size; a size that is not there is `defaults`' or None.
    `tensors` names the checkpoint's modules, `layer_tensors` those of a layer (below `layer_prefix`), by the
    engine's names for them. A module's weight and bias are its name + ".weight" and ".bias".
    `biases` says which setting gives these modules a bias, and its default.
    """

    norm: str
    positions: str
    is_gated: bool
    keys: Mapping[str, str]
    tensors: Mapping[str, str]
    layer_prefix: str
    layer_tensors: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    biases: Mapping[tuple[str, ...], tuple[str, bool]] = field(default_factory=dict)
    must: Mapping[str, Must] = field(default_factory=dict)
    equal_sizes: tuple[tuple[str, str], ...] = ()
    position_offset: int = 0
    """Rows of the table of positions that come before position 0."""

    def module(self, name: str, layer: int | None = None) -> str:
        """Return the checkpoint's name for a module of the model, or of a layer."""
        if layer is None:
            return self.tensors[name]
        return f"{self.layer_prefix}.{layer}.{self.layer_tensors[name]}"


ATTENTION = ("q", "k", "v", "o")

_LLAMA = Family(
    norm="rms",
    positions="rotary",
    is_gated=True,
    keys={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "max_context": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
        "tied_head": "tie_word_embeddings",
    },
    defaults={"max_context": 2048, "norm_eps": 1e-6, "tied_head": False, "activation": "silu"},
    biases={ATTENTION: ("attention_bias", False), ("gate", "up", "down"): ("mlp_bias", False)},
    must={"sliding_window": Must(None, default=None)},
    tensors={"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"},
    layer_prefix="model.layers",
    layer_tensors={
        "attention_norm": "input_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
        "activation": "mlp.act_fn",
    },
)

_MISTRAL = replace(
    _LLAMA,
    biases={},
    must={
        "sliding_window": Must(None, default=4096),
        "attention_bias": Must(False, default=False),
        "mlp_bias": Must(False, default=False),
    },
)

_OPT = Family(
    norm="layer",
    positions="learned",
    is_gated=False,
    keys={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "ffn_dim",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "max_context": "max_position_embeddings",
        "tied_head": "tie_word_embeddings",
    },
    defaults={"max_context": 2048, "norm_eps": 1e-5, "tied_head": True, "activation": "relu"},
    biases={(*ATTENTION, "up", "down"): ("enable_bias", True)},
    must={
        "do_layer_norm_before": Must(True, default=True),
        "_remove_final_layer_norm": Must(False, default=False),
        "layer_norm_elementwise_affine": Must(True, default=True),
    },
    equal_sizes=(("word_embed_proj_dim", "hidden_size"),),
    position_offset=2,
    tensors={
        "embedding": "model.decoder.embed_tokens",
        "position_embedding": "model.decoder.embed_positions",
        "final_norm": "model.decoder.final_layer_norm",
        "head": "lm_head",
    },
    layer_prefix="model.decoder.layers",
    layer_tensors={
        "attention_norm": "self_attn_layer_norm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
        "mlp_norm": "final_layer_norm",
        "up": "fc1",
        "down": "fc2",
        "activation": "activation_fn",
    },
)

FAMILIES = {"llama": _LLAMA, "mistral": _MISTRAL, "opt": _OPT}
"""The families by `model_type`."""
