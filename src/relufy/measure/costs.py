"""The two costs of a token of a model with the zeros that were measured at its sites."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from relufy.engine.quantize import DTYPES
from relufy.engine.spec import DecoderSpec, decoder_spec
from relufy.measure.bytes_read import Packing, bytes_engine
from relufy.measure.cost import Cost, LayerShapes, Sparsity, macs_paper
from relufy.measure.site_weights import site_weights
from relufy.model.sparsifiers import sparsity_of
from relufy.model.structure import BlockSites, find_blocks


def model_macs(model: PreTrainedModel, sparsity: Sparsity) -> Cost:
    """Return `macs_paper` of a model with the zeros measured at its sites."""
    layers = [_projection_shapes(block) for block in find_blocks(model)]
    head: Any = model.get_output_embeddings()
    has_sparse_inputs = any("up" in s.sites for s in sparsity_of(model).sparsifiers)
    return macs_paper(layers, tuple(head.weight.shape), sparsity, has_sparse_inputs)


def model_bytes(model: PreTrainedModel, sparsity: Sparsity, context: int) -> dict[str, Cost]:
    """Return `bytes_engine` at `context` positions for each type that a model can be packed as.

    Raises UserError for a model that the engine does not run.
    """
    config = model.config.to_dict()
    config["architectures"] = config.get("architectures") or [type(model).__name__]
    spec = decoder_spec(config)
    ranks = _ranks(spec, find_blocks(model))
    return {dtype: bytes_engine(spec, sparsity, context, Packing(dtype, ranks=ranks)) for dtype in DTYPES}


def _projection_shapes(block: BlockSites) -> LayerShapes:
    """Return (out, in) at each site; a fused projection is divided among the sites that it serves."""
    weights = site_weights(block)
    return {site: (weights[site] / p.shape[1], p.shape[1]) for site, p in block.projections().items()}


def _ranks(spec: DecoderSpec, blocks: list[BlockSites]) -> Mapping[tuple[int, str], int]:
    """Return the rank of each low-rank correction, by layer and site."""
    found = {}
    for layer, block in zip(spec.layers, blocks, strict=True):
        for site, mask in layer.masks.items():
            if mask.correction:
                module: Any = block.projections()[site].module
                found[block.index, site] = len(module.sparsifier.low_rank_in)
    return found
