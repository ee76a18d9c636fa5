"""Where a checkpoint keeps what the engine needs, and the check that all of it has the right shape."""

from relufy.engine.safetensors_folder import SafetensorsFolder
from relufy.engine.spec import DecoderSpec
from relufy.errors import UserError

IGNORED = ("rotary_emb",)
"""Parts of names of tensors that old checkpoints hold and nobody needs."""


def norm_of(site: str) -> str:
    """Return the norm whose output the projections of q k v, or of gate up, read."""
    return "attention_norm" if site in ("q", "k", "v") else "mlp_norm"


def mask_module(spec: DecoderSpec, layer: int, site: str) -> str:
    """Return the name of the checkpoint's module that holds the tensors of a site's mask."""
    if site == "neuron":
        return spec.family.module("activation", layer)
    readers = spec.readers(site)
    is_shared = spec.layers[layer].shares_mask(readers)
    return spec.family.module(norm_of(site) if is_shared else site, layer) + ".sparsifier"


def check_checkpoint(weights: SafetensorsFolder, spec: DecoderSpec) -> None:
    """Refuse a checkpoint whose tensors are not those of its config.json. Raises UserError."""
    expected = _expected_shapes(spec, weights)
    for name, shape in expected.items():
        if weights.shape(name) != shape:
            found = list(weights.shape(name))
            raise UserError(f"{weights.folder}: {name} has shape {found}, config.json says {list(shape)}")
    ignorable = {spec.family.module("head") + ".weight"} if spec.tied_head else set()
    unknown = [name for name in weights.names() if name not in expected and name not in ignorable]
    unknown = [name for name in unknown if not any(part in name for part in IGNORED)]
    if unknown:
        raise UserError(f"{weights.folder}: the engine has no place for the tensor {unknown[0]}")


def _expected_shapes(spec: DecoderSpec, weights: SafetensorsFolder) -> dict[str, tuple[int, ...]]:
    family, hidden = spec.family, spec.hidden_size
    shapes: dict[str, tuple[int, ...]] = {family.module("embedding") + ".weight": (spec.vocab_size, hidden)}
    if family.positions == "learned":
        positions = spec.max_context + family.position_offset
        shapes[family.module("position_embedding") + ".weight"] = (positions, hidden)
    shapes |= _norm_shapes(spec, family.module("final_norm"))
    if not spec.tied_head:
        shapes[family.module("head") + ".weight"] = (spec.vocab_size, hidden)
    for layer in range(spec.num_layers):
        shapes |= _layer_shapes(spec, layer)
        for site in spec.layers[layer].masks:
            shapes |= _mask_shapes(spec, layer, site, weights)
    return shapes


def _norm_shapes(spec: DecoderSpec, module: str) -> dict[str, tuple[int, ...]]:
    kinds = ("weight", "bias") if spec.family.norm == "layer" else ("weight",)
    return {f"{module}.{kind}": (spec.hidden_size,) for kind in kinds}


def _layer_shapes(spec: DecoderSpec, layer: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for norm in ("attention_norm", "mlp_norm"):
        shapes |= _norm_shapes(spec, spec.family.module(norm, layer))
    for name, (outputs, inputs) in spec.matrix_shapes().items():
        module = spec.family.module(name, layer)
        shapes[module + ".weight"] = (outputs, inputs)
        if name in spec.biased:
            shapes[module + ".bias"] = (outputs,)
    return shapes


def _mask_shapes(
    spec: DecoderSpec, layer: int, site: str, weights: SafetensorsFolder
) -> dict[str, tuple[int, ...]]:
    mask, module = spec.layers[layer].masks[site], mask_module(spec, layer, site)
    outputs, inputs = (0, spec.intermediate_size) if site == "neuron" else spec.matrix_shapes()[site]
    shapes: dict[str, tuple[int, ...]] = {f"{module}.{name}": (inputs,) for name in mask.per_channel}
    if mask.correction:
        rank = weights.shape(f"{module}.low_rank_in")[0]
        shapes |= {f"{module}.low_rank_in": (rank, inputs), f"{module}.low_rank_out": (outputs, rank)}
    return shapes
