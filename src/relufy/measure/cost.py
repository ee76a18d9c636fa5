"""What one generated token costs, dense and sparse, in two separate accounts.

`macs_paper` is the accounting of ReLU Strikes Back (arXiv 2310.04564): multiply-accumulates of the linear
layers. `bytes_engine` is what our engine reads from memory: weights with their padding, lists of active
inputs and neurons, and keys and values. The first is about arithmetic and other papers, the second about
speed here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from relufy.engine.packed_file import padded
from relufy.engine.spec import DecoderSpec, LayerSpec

FLOAT_BYTES = 4
INDEX_BYTES = 4
KV_BLOCK = 32

Sparsity = Mapping[str, Sequence[float]]
"""Site -> the share of zeros, one value per layer."""

LayerShapes = Mapping[str, tuple[float, int]]
"""Site -> (out, in) of its projection in a layer. Fused projections are given by their parts."""


@dataclass(frozen=True)
class DenseSparse:
    """One cost of a token in a dense model and in the measured one."""

    dense: float
    sparse: float

    @property
    def ratio(self) -> float:
        """How many times less the sparse model costs."""
        return self.dense / self.sparse


def macs_paper(
    layers: Sequence[LayerShapes], head: tuple[int, int], sparsity: Sparsity, has_sparse_inputs: bool
) -> DenseSparse:
    """Return multiply-accumulates per token: every linear layer and the head (out, in), nothing else.

    q k v, gate and down skip the columns of zero inputs; o is dense. In a gated MLP, up skips the rows of the
    neurons that are zero at down (stage 1), or, where the inputs are sparse (`has_sparse_inputs`, stage 2),
    its own zero columns: the paper does not compound the two.
    """

    def share(site: str, layer: int) -> float:
        return 1.0 - sparsity.get(site, [0.0] * len(layers))[layer]

    dense = sparse = float(head[0] * head[1])
    for index, shapes in enumerate(layers):
        has_row_skipping = "gate" in shapes and not has_sparse_inputs
        reads = {site: share(site, index) for site in shapes}
        reads |= {"o": 1.0, "up": share("down" if has_row_skipping else "up", index)}
        for site, (outputs, inputs) in shapes.items():
            dense += outputs * inputs
            sparse += outputs * inputs * reads[site]
    return DenseSparse(dense, sparse)


def bytes_engine(spec: DecoderSpec, sparsity: Sparsity, context: int) -> DenseSparse:
    """Return the bytes that the engine reads for one token at `context` positions, from an f32 pack.

    Dense means the same model packed with no sparsifier at all, not the sparse file with skipping off.
    """
    dense_layers = tuple(
        replace(s, has_sparse_neurons=False, attention_input_relu=False, mlp_input_relu=False)
        for s in spec.layers
    )
    dense = bytes_by_kind(replace(spec, layers=dense_layers), {}, context)
    return DenseSparse(sum(dense.values()), sum(bytes_by_kind(spec, sparsity, context).values()))


def bytes_by_kind(spec: DecoderSpec, sparsity: Sparsity, context: int) -> dict[str, float]:
    """Return the bytes read for one token, by what is read. The engine's own counter agrees (a test)."""
    hidden = padded(spec.hidden_size) * FLOAT_BYTES
    kinds = {
        "embedding and head": (1 + spec.vocab_size) * hidden,
        "q k v": 0.0,
        "o": 0.0,
        "gate": 0.0,
        "up and down": 0.0,
        "keys and values": spec.num_layers * _kv_bytes(spec, context),
        "norms and lists": (1 + 2 * spec.num_layers) * hidden,
    }
    for index, layer in enumerate(spec.layers):
        used = {
            site: 1.0 - sparsity[site][index] if site in sparsity else 1.0 for site in ("q", "gate", "neuron")
        }
        for kind, amount in _layer_bytes(spec, layer, used).items():
            kinds[kind] += amount
    return kinds


def _layer_bytes(spec: DecoderSpec, layer: LayerSpec, used: Mapping[str, float]) -> dict[str, float]:
    hidden, neurons = spec.hidden_size, spec.intermediate_size
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    qkv = sum(
        _matrix_bytes(rows, hidden, layer.attention_input_relu, used["q"]) for rows in (queries, keys, keys)
    )
    gate = _matrix_bytes(neurons, hidden, layer.mlp_input_relu, used["gate"])
    up_down = gate + hidden * padded(neurons) * FLOAT_BYTES
    lists = _list_bytes(hidden, layer.attention_input_relu, used["q"])
    lists += _list_bytes(hidden, layer.mlp_input_relu, used["gate"])
    if layer.has_sparse_neurons:
        up_down = neurons * used["neuron"] * 2 * padded(hidden) * FLOAT_BYTES
        lists += _list_bytes(neurons, True, used["neuron"])
    output = hidden * padded(queries) * FLOAT_BYTES
    return {"q k v": qkv, "o": output, "gate": gate, "up and down": up_down, "norms and lists": lists}


def _kv_bytes(spec: DecoderSpec, context: int) -> float:
    """Keys are read in whole blocks, values by position."""
    key_positions = -(-context // KV_BLOCK) * KV_BLOCK
    floats = key_positions * spec.head_dim + context * padded(spec.head_dim)
    return spec.num_kv_heads * floats * FLOAT_BYTES


def _matrix_bytes(outputs: int, inputs: int, has_sparse_input: bool, used: float) -> float:
    """A matrix stored by input is read where the input is used; one stored by output is read whole."""
    if has_sparse_input:
        return inputs * used * padded(outputs) * FLOAT_BYTES
    return outputs * padded(inputs) * FLOAT_BYTES


def _list_bytes(width: int, is_sparse: bool, used: float) -> float:
    return width * used * INDEX_BYTES if is_sparse else 0.0
