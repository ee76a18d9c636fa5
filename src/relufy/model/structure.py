"""Decoder blocks, recognised by structure: by the names of their projections and by their shapes.

A block that holds any other weight matrix is refused, so that a mixture of experts or a recurrent mixer is
not silently taken for a dense decoder.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from relufy.errors import UserError
from relufy.model.kinds import block_lists, num_layers, other_kinds

MLP_SHAPES: tuple[tuple[str | None, str, str], ...] = (
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", "gate_up_proj", "down_proj"),
    (None, "up_proj", "down_proj"),
    (None, "fc1", "fc2"),
    (None, "fc_in", "fc_out"),
    (None, "c_fc", "c_proj"),
    (None, "dense_h_to_4h", "dense_4h_to_h"),
    ("Wi", "Wi", "Wo"),
    ("w_in.w_0", "w_in.w_1", "w_out"),
    (None, "0", "2"),
)
"""(gate, up, down) of the MLPs of dense decoders. The same name twice: one fused projection."""

ATTENTION_SHAPES: tuple[tuple[str, str, str], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("c_attn", "c_attn", "c_attn"),
    ("query_key_value", "query_key_value", "query_key_value"),
    ("qkv_proj", "qkv_proj", "qkv_proj"),
    ("Wqkv", "Wqkv", "Wqkv"),
    ("Wq", "Wk", "Wv"),
    ("project_q", "project_k", "project_v"),
)
ATTENTION_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "Wo", "attention_out")
ACTIVATION_ATTRIBUTES = ("act_fn", "activation_fn", "act", "gelu_impl", "w_in.act", "1")
"""Names are relative to the module that holds a whole MLP or attention; "0" is the first of a Sequential."""


@dataclass(frozen=True)
class NamedModule:
    """A module and its dotted name in the model."""

    name: str
    module: nn.Module


@dataclass(frozen=True)
class Projection(NamedModule):
    """A linear layer. `shape` is (out, in), also where the weight is stored transposed (Conv1D)."""

    shape: tuple[int, int]

    def matrix(self) -> torch.Tensor:
        """Return the weight as [out, in], outside of any graph."""
        weight: torch.Tensor = self.module.weight.detach()  # type: ignore[operator,assignment]
        return weight.T if isinstance(self.module, Conv1D) else weight


@dataclass(frozen=True)
class Activation:
    """Where the MLP's activation module hangs: `owner.attribute`."""

    name: str
    owner: nn.Module
    attribute: str

    @property
    def module(self) -> nn.Module:
        return getattr(self.owner, self.attribute)


@dataclass(frozen=True)
class BlockSites:
    """The sites of one decoder block.

    A fused projection stands at each site that it serves (`q is k is v`, or `gate is up`). `gate` is None in
    a plain MLP. A norm is None where no norm's output goes to exactly these readers: post-norm families have
    none.
    """

    index: int
    name: str
    q: Projection
    k: Projection
    v: Projection
    o: Projection
    gate: Projection | None
    up: Projection
    down: Projection
    activation: Activation
    attention_norm: NamedModule | None = None
    mlp_norm: NamedModule | None = None

    def projections(self) -> dict[str, Projection]:
        """Return the projection at each site that has one."""
        pairs = ((site, getattr(self, site)) for site in ("q", "k", "v", "o", "gate", "up", "down"))
        return {site: projection for site, projection in pairs if projection is not None}

    def groups(self) -> list[tuple[str, ...]]:
        """Return the sites by the projection that serves them: one tuple for each, in the order of the sites.

        Sites that a fused projection serves can only have one mask.
        """
        served: dict[str, tuple[str, ...]] = {}
        for site, projection in self.projections().items():
            served[projection.name] = (*served.get(projection.name, ()), site)
        return list(served.values())

    def shared_inputs(self) -> list[tuple[NamedModule | None, tuple[str, ...]]]:
        """Return each input that projections share, as (the norm that makes it, the sites that read it).

        In parallel blocks (Falcon, Phi) one norm feeds attention and MLP, and there is one entry for both.
        """
        mlp = ("gate", "up") if self.gate else ("up",)
        if self.attention_norm is not None and self.attention_norm == self.mlp_norm:
            return [(self.attention_norm, ("q", "k", "v", *mlp))]
        return [(self.attention_norm, ("q", "k", "v")), (self.mlp_norm, mlp)]


def find_blocks(model: nn.Module) -> list[BlockSites]:
    """Return what the module tree alone tells of every block: all but the norms.

    Raises UserError, with what was looked for and what was found, if the model is not recognised.
    """
    name, blocks = _decoder_blocks(model)
    return [_recognise(model, f"{name}.{index}", index, block) for index, block in enumerate(blocks)]


def stack_name(blocks: Sequence[BlockSites]) -> str:
    """Return the dotted name of the module that runs the blocks one after another."""
    return blocks[0].name.rpartition(".")[0].rpartition(".")[0]


def _decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    _refuse_other_kinds(model)
    found = block_lists(model)
    if len(found) != 1:
        lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
        sizes = ", ".join(f"{name} ({len(m)})" for name, m in lists[:6]) or "none"
        raise UserError(
            f"{type(model).__name__} is not a decoder that relufy knows: looked for one list of "
            f"num_hidden_layers = {num_layers(model)} blocks, found the lists: {sizes}"
        )
    return found[0]


def _refuse_other_kinds(model: nn.Module) -> None:
    name, config = type(model).__name__, getattr(model, "config", None)
    if isinstance(config, PretrainedConfig) and config.get_text_config() is not config:
        raise UserError(f"{name} is more than a decoder of text, and only such can be made sparse so far")
    if kinds := other_kinds(model):
        found = "; ".join(f"{kind.word} ({kind.details})" for kind in kinds)
        raise UserError(
            f"{name} is no dense decoder, and only such can be made sparse so far; it has: {found}"
        )


def _recognise(model: nn.Module, name: str, index: int, block: nn.Module) -> BlockSites:
    mlps = list(_mlps(name, block))
    attentions = list(_attentions(name, block))
    where = f"{type(model).__name__}, block {name} ({type(block).__name__})"
    if len(mlps) != 1:
        looked_for = " | ".join(" ".join(dict.fromkeys(filter(None, shape))) for shape in MLP_SHAPES)
        raise UserError(f"{where}: looked for one MLP ({looked_for}), found {len(mlps)} in {_weights(block)}")
    if len(attentions) != 1:
        looked_for = " | ".join(" ".join(dict.fromkeys(shape)) for shape in ATTENTION_SHAPES)
        looked_for = f"({looked_for}) with ({' | '.join(ATTENTION_OUTPUTS)})"
        raise UserError(
            f"{where}: looked for one attention {looked_for}, found {len(attentions)} in {_weights(block)}"
        )
    (gate, up, down, activation), (q, k, v, o) = mlps[0], attentions[0]
    sites = BlockSites(index, name, q, k, v, o, gate, up, down, activation)
    _check_shapes(where, sites)
    _check_complete(where, sites, block)
    return sites


def _mlps(
    name: str, block: nn.Module
) -> Iterator[tuple[Projection | None, Projection, Projection, Activation]]:
    for relative, owner in block.named_modules():
        owner_name = f"{name}.{relative}" if relative else name
        activation = _activation(owner_name, owner)
        for gate, up, down in MLP_SHAPES:
            found = [_projection(owner_name, owner, part) for part in (gate or up, up, down)]
            if activation and all(found):
                yield (found[0] if gate else None, found[1], found[2], activation)  # type: ignore[misc]
                break


def _attentions(name: str, block: nn.Module) -> Iterator[tuple[Projection, ...]]:
    for relative, owner in block.named_modules():
        owner_name = f"{name}.{relative}" if relative else name
        outputs = [p for part in ATTENTION_OUTPUTS if (p := _projection(owner_name, owner, part))]
        for shape in ATTENTION_SHAPES:
            found = [p for part in shape if (p := _projection(owner_name, owner, part))]
            if len(found) == 3 and outputs:
                yield (*found, outputs[0])
                break


def _activation(owner_name: str, owner: nn.Module) -> Activation | None:
    part = next((part for part in ACTIVATION_ATTRIBUTES if _submodule(owner, part)), None)
    if part is None:
        return None
    parent, _, attribute = part.rpartition(".")
    return Activation(f"{owner_name}.{part}", owner.get_submodule(parent), attribute)


def _projection(owner_name: str, owner: nn.Module, part: str) -> Projection | None:
    module = _submodule(owner, part)
    weight = getattr(module, "weight", None)
    if module is None or weight is None or weight.ndim != 2:
        return None
    is_transposed = isinstance(getattr(module, "base_layer", module), Conv1D)
    rows, columns = weight.shape
    return Projection(f"{owner_name}.{part}", module, (columns, rows) if is_transposed else (rows, columns))


def _submodule(owner: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a dotted path below the owner, None if there is none."""
    module: object = owner
    for name in path.split("."):
        module = getattr(module, name, None)
    return module if isinstance(module, nn.Module) else None


def _check_shapes(where: str, sites: BlockSites) -> None:
    hidden, intermediate = sites.down.shape
    up_rows = 2 * intermediate if sites.gate == sites.up else intermediate
    expected = {"up": (up_rows, hidden), "gate": (up_rows, hidden), "o": (hidden, sites.o.shape[1])}
    expected |= {site: (getattr(sites, site).shape[0], hidden) for site in ("q", "k", "v")}
    for site, projection in sites.projections().items():
        if projection.shape != expected.get(site, projection.shape):
            raise UserError(
                f"{where}: {projection.name} should be {expected[site]} beside down, is {projection.shape}"
            )


def _check_complete(where: str, sites: BlockSites, block: nn.Module) -> None:
    known = tuple(f"{projection.name}." for projection in sites.projections().values())
    norms = tuple(f"{norm.name}." for norm in norms_of(sites.name, block))
    names = (f"{sites.name}.{name}" for name, weight in block.named_parameters() if weight.ndim >= 2)
    other = [name for name in names if not name.startswith(known + norms)]
    if other:
        raise UserError(
            f"{where}: beside one attention and one MLP the block has weights that relufy does not know "
            f"(a gate on attention, a second mixer?): {', '.join(other[:4])}{', ...' * (len(other) > 4)}"
        )


def _weights(block: nn.Module) -> str:
    """Name the modules that hold the block's weight matrices, for a refusal."""
    names = (name.rpartition(".")[0] for name, weight in block.named_parameters() if weight.ndim >= 2)
    return ", ".join(dict.fromkeys(f"{name} ({type(block.get_submodule(name)).__name__})" for name in names))


def norms_of(name: str, block: nn.Module) -> list[NamedModule]:
    """Return the modules inside a block that call themselves norms."""
    inside = [(f"{name}.{relative}", module) for relative, module in block.named_modules() if relative]
    return [NamedModule(full, module) for full, module in inside if "norm" in type(module).__name__.lower()]
