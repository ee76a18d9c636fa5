"""The decoder's specification as the named numbers of a packed file, which csrc/decoder.cpp reads."""

from relufy.activation_sparsity import Sparsifier
from relufy.engine.packed_file import padded
from relufy.engine.spec import ACTIVATIONS, DecoderSpec, LayerSpec

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
NORMS = {"rms": 0, "layer": 1}
POSITIONS = {"rotary": 0, "learned": 1}
SELECT = {"relu": 1, "threshold": 2, "topk": 3}
MAX_PARTITIONS = 16

SHARES = {"k": "q", "v": "q", "up": "gate"}
"""Sites whose mask may be that of another, which reads the same input."""


def neurons_per_partition(intermediate_size: int) -> int:
    """Return the size of the fixed groups in which the MLP's neurons are claimed and summed."""
    return padded(-(-intermediate_size // MAX_PARTITIONS))


def numbers(spec: DecoderSpec) -> dict[str, float]:
    """Return the specification as numbers by name."""
    found = {name: getattr(spec, name) for name in (*SIZES, "head_dim", "max_context", "norm_eps")}
    found["norm_kind"] = NORMS[spec.family.norm]
    found["position_kind"] = POSITIONS[spec.family.positions]
    found["neurons_per_partition"] = neurons_per_partition(spec.intermediate_size)
    for index, layer in enumerate(spec.layers):
        of_layer = _layer_numbers(spec, layer)
        found |= {f"layers.{index}.{name}": value for name, value in of_layer.items()}
    return {name: float(value) for name, value in found.items()}


def _layer_numbers(spec: DecoderSpec, layer: LayerSpec) -> dict[str, float]:
    found: dict[str, float] = {
        "activation": ACTIVATIONS[layer.activation],
        "shift": layer.shift,
        "cutoff": layer.cutoff,
        "gated": spec.family.is_gated,
        "up_relu": layer.has_up_relu,
        "statistical": layer.deviations is not None,
        "deviations": layer.deviations or 0.0,
        "neuron.decode_only": 0,
        "neuron.dense_first": 0,
    }
    for site, mask in layer.masks.items():
        found |= {f"{site}.{name}": value for name, value in _mask_numbers(mask).items()}
        first = layer.masks.get(SHARES.get(site, ""))
        if first is not None and _is_same_mask(layer, spec.readers(site), mask, first):
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


def _is_same_mask(layer: LayerSpec, readers: tuple[str, ...], mask: Sparsifier, first: Sparsifier) -> bool:
    """Tell whether two masks on one input always keep the same: each has its own tensors, unless shared.

    A correction needs what its own mask leaves out, so those are never told to be the same.
    """
    has_own_tensors = bool(mask.per_channel or mask.correction)
    return layer.shares_mask(readers) or (not has_own_tensors and mask.behaves_like(first))
