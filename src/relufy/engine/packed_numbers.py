"""The decoder's specification as the named numbers of a packed file, which csrc/decoder.cpp reads."""

from relufy.activation_sparsity import Sparsifier
from relufy.engine.layer_spec import ACTIVATIONS, LayerSpec
from relufy.engine.packed_file import padded
from relufy.engine.spec import DecoderSpec

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
SCALES = ("norm_eps", "attention_scale", "embedding_scale")
NORMS = {"rms": 0, "layer": 1}
POSITIONS = {"rotary": 0, "learned": 1, "alibi": 2}
SELECT = {"relu": 1, "threshold": 2, "topk": 3}
MAX_PARTITIONS = 16
SET_WORD = 64

SHARES = {"k": "q", "v": "q", "up": "gate"}
"""Sites whose mask may be that of another, which reads the same input."""


def neurons_per_partition(intermediate_size: int, has_predictor: bool = False) -> int:
    """Return the size of the fixed groups in which the MLP's neurons are claimed and summed.

    With a predictor, each writes whole words of the set of candidates.
    """
    size = padded(-(-intermediate_size // MAX_PARTITIONS))
    return -(-size // SET_WORD) * SET_WORD if has_predictor else size


def numbers(spec: DecoderSpec, has_predictor: bool = False) -> dict[str, float]:
    """Return the specification as numbers by name, of a file with or without a predictor."""
    family = spec.family
    found = {name: getattr(spec, name) for name in (*SIZES, "head_dim", "max_context", *SCALES)}
    found |= {
        "neurons_per_partition": neurons_per_partition(spec.intermediate_size, has_predictor),
        "norm_kind": NORMS[family.norm],
        "input_norms": family.has("attention_norm"),
        "output_norms": family.has("attention_output_norm"),
        "query_norm": 0 if not family.has("q_norm") else 1 if family.norms_each_head else 2,
        "parallel": family.is_parallel,
        "position_kind": POSITIONS[family.positions],
        "alibi_rounds": family.rounds_alibi and family.positions == "alibi",
        "attention_softcap": spec.attention_softcap or 0.0,
        "final_softcap": spec.final_softcap or 0.0,
        "num_ropes": len(spec.ropes),
    }
    if has_predictor:
        firsts = [layer.predictor.dense_first_tokens for layer in spec.layers if layer.predictor]
        found["predictor_dense_first"] = max(firsts)
    for index, rope in enumerate(spec.ropes):
        found |= {f"ropes.{index}.dim": rope.rotary_dim, f"ropes.{index}.scale": rope.scale}
    for index, layer in enumerate(spec.layers):
        of_layer = _layer_numbers(spec, index, layer)
        found |= {f"layers.{index}.{name}": value for name, value in of_layer.items()}
    return {name: float(value) for name, value in found.items()}


def rope_tensor(index: int) -> str:
    """Return the name of the tensor that holds a table of rotary positions."""
    return f"rope_frequencies.{index}" if index else "rope_frequencies"


def _layer_numbers(spec: DecoderSpec, index: int, layer: LayerSpec) -> dict[str, float]:
    found: dict[str, float] = {
        "activation": ACTIVATIONS[layer.activation],
        "shift": layer.shift,
        "cutoff": layer.cutoff,
        "gated": spec.family.is_gated,
        "up_relu": layer.has_up_relu,
        "statistical": layer.deviations is not None,
        "deviations": layer.deviations or 0.0,
        "window": layer.window or 0,
        "rope": 0 if layer.rope is None else layer.rope + 1,
        "neuron.decode_only": 0,
        "neuron.dense_first": 0,
    }
    for site, mask in layer.masks.items():
        found |= {f"{site}.{name}": value for name, value in _mask_numbers(mask).items()}
        first = layer.masks.get(SHARES.get(site, ""))
        if first is not None and _is_same_mask(spec, index, site, first):
            found[f"{site}.shares_{SHARES[site]}"] = 1
    return found


def _mask_numbers(mask: Sparsifier) -> dict[str, float]:
    return {
        "select": SELECT[mask.function],
        "threshold": mask.threshold or 0.0,
        "k": mask.k or 0,
        "decode_only": mask.phase == "decode",
        "dense_first": mask.dense_first_tokens,
    }


def _is_same_mask(spec: DecoderSpec, index: int, site: str, first: Sparsifier) -> bool:
    """Tell whether two masks on one input always keep the same: each has its own tensors, unless shared.

    A correction needs what its own mask leaves out, so those are never told to be the same.
    """
    mask = spec.layers[index].masks[site]
    has_own_tensors = bool(mask.per_channel or mask.correction)
    return spec.shares_mask(index, site) or (not has_own_tensors and mask.behaves_like(first))
