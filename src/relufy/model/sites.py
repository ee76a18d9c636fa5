"""The sites of a decoder: its blocks are recognised by structure, the norms that feed them by dataflow."""

from dataclasses import replace

from torch import nn

from relufy.errors import UserError
from relufy.model.dataflow import Dataflow, record_dataflow
from relufy.model.structure import BlockSites, NamedModule, find_blocks, norms_of


def find_sites(model: nn.Module) -> list[BlockSites]:
    """Return the sites of every decoder block, in order. Raises UserError if the model is not recognised."""
    blocks = find_blocks(model)
    try:
        flow = record_dataflow(model)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{type(model).__name__} could not run a single token to show its dataflow: {reason}"
        ) from error
    return [_with_norms(model, block, flow) for block in blocks]


def _with_norms(model: nn.Module, sites: BlockSites, flow: Dataflow) -> BlockSites:
    """Add the norms that feed the shared inputs, and check that the activation is where the tables say."""
    source = sites.gate or sites.up
    is_fused = sites.gate == sites.up
    if not flow.was_called(sites.activation.name) or not (
        is_fused or flow.readers_within(source.name, [sites.activation.name])
    ):
        raise UserError(
            f"{type(model).__name__}: looked for an activation module that reads {source.name}, "
            f"but {sites.activation.name} ({type(sites.activation.module).__name__}) does not"
        )
    norms = norms_of(sites.name, model.get_submodule(sites.name))
    attention = {projection.name for projection in (sites.q, sites.k, sites.v)}
    mlp = {projection.name for projection in (sites.gate, sites.up) if projection}
    return replace(
        sites,
        attention_norm=_norm_feeding(flow, norms, sites, attention, attention | mlp),
        mlp_norm=_norm_feeding(flow, norms, sites, mlp, attention | mlp),
    )


def _norm_feeding(
    flow: Dataflow, norms: list[NamedModule], sites: BlockSites, group: set[str], both_groups: set[str]
) -> NamedModule | None:
    """Return the norm whose output is read by the whole group, or by both whole groups, and nothing else."""
    known = {projection.name for projection in sites.projections().values()}
    for norm in norms:
        is_read_by_whole_groups = flow.readers_within(norm.name, known) in (group, both_groups)
        if is_read_by_whole_groups and flow.is_read_only_by(norm.name, known):
            return norm
    return None
