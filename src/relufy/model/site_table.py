"""The table of a model's sites: what each projection weighs, what feeds it, which projections are one.

It is made from config.json alone: the model is built without weights, and one token without values shows its
dataflow.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from relufy.errors import UserError
from relufy.hub import config_folder, read_config
from relufy.model.configuration import refuse_quantized
from relufy.model.empty import build_empty
from relufy.model.kinds import other_kinds, pattern_of
from relufy.model.sites import find_sites
from relufy.model.structure import BlockSites, Projection, norms_of

SITES = ("q", "k", "v", "o", "gate", "up", "down")
FUSED_NOTES = {
    ("q", "k", "v"): "they get one mask where teal, wina and rsparse give each its own, "
    "and chess's mask on the input of q alone cannot be had",
    ("gate", "up"): "they get one mask where teal, wina and rsparse give each its own",
}
"""What the methods lose where one projection serves several sites."""


@dataclass(frozen=True)
class SiteRow:
    """One projection, in all the blocks that have it alike."""

    sites: tuple[str, ...]
    """The sites that it serves; none if relufy does not know what the weight is."""
    module: str
    """Its dotted name, with `*` for the number of the block."""
    shape: tuple[int, ...]
    """(out, in), also where the weight is stored transposed."""
    modules: int
    """How many such projections the model has."""
    parameters: int
    share_of_blocks: float
    """Share of the blocks' weight matrices."""
    share_of_model: float
    bytes: int
    input: str | None
    """The norm that makes its input and feeds nothing else; "attention" or "neuron"; None if no norm does."""


@dataclass(frozen=True)
class Neuron:
    """The activation of the MLPs, in all the blocks that have it alike."""

    module: str
    activation: str
    """Its class."""
    width: int
    """Neurons of a block."""
    blocks: int


@dataclass(frozen=True)
class Part:
    """A part of the model, and what it weighs."""

    name: str
    parameters: int
    share_of_model: float
    bytes: int


@dataclass(frozen=True)
class SiteTable:
    """The sites of a model, or why it has none."""

    model: str
    """Its class."""
    kind: str
    """"dense decoder", or what it is instead."""
    refusal: str | None
    """Why it cannot be made sparse; None if it can."""
    dtype: str
    """The dtype whose bytes are counted."""
    rows: tuple[SiteRow, ...]
    neurons: tuple[Neuron, ...]
    parts: tuple[Part, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain data."""
        return asdict(self)


def site_table(model: str | Path) -> SiteTable:
    """Return the sites of a checkpoint folder, "bundled" or a hub id, of which config.json is enough.

    Raises UserError if transformers cannot build the model. One that it can build, and relufy cannot make
    sparse, has a table of its weights, with the reason.
    """
    folder = config_folder(model)
    config, empty = read_config(folder), build_empty(folder)
    dtype = _dtype(config)
    try:
        blocks, refusal = find_sites(empty), None
    except UserError as error:
        blocks, refusal = [], str(error)
    count = _Counter(sum(weight.numel() for weight in empty.parameters()), dtype.itemsize)
    rows = _site_rows(blocks, count) if blocks else _weight_rows(empty, count)
    kind = "; ".join(f"{kind.word}, {kind.details}" for kind in other_kinds(empty))
    return SiteTable(
        model=type(empty).__name__,
        kind="dense decoder" if blocks else kind or "not recognised",
        refusal=refusal,
        dtype=str(dtype).removeprefix("torch."),
        rows=rows,
        neurons=_neurons(blocks),
        parts=_parts(empty, sum(row.parameters for row in rows), count),
        notes=(*_notes(blocks), *_quantised_note(config, dtype)),
    )


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Return what a config.json says that the weights are, float32 if it says nothing."""
    parts = (config, config.get("text_config") or {})
    names = (part.get(key) for part in parts for key in ("dtype", "torch_dtype"))
    dtype = getattr(torch, next(filter(None, names), "float32"), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


@dataclass(frozen=True)
class _Counter:
    """Turns numbers of parameters into shares of the model and into bytes."""

    total: int
    bytes_each: int

    def part(self, name: str, parameters: int) -> Part:
        return Part(name, parameters, self.share(parameters), parameters * self.bytes_each)

    def share(self, parameters: int) -> float:
        return parameters / self.total if self.total else 0.0

    def rows(self, found: Iterable[tuple]) -> tuple[SiteRow, ...]:
        """Return one row for each (sites, module, shape, input) among those found, in order."""
        numbers: defaultdict[tuple, int] = defaultdict(int)
        for key in found:
            numbers[key] += 1
        in_blocks = sum(number * prod(shape) for (_, _, shape, _), number in numbers.items())
        return tuple(
            SiteRow(
                sites,
                module,
                shape,
                modules=number,
                parameters=number * prod(shape),
                share_of_blocks=number * prod(shape) / in_blocks if in_blocks else 0.0,
                share_of_model=self.share(number * prod(shape)),
                bytes=number * prod(shape) * self.bytes_each,
                input=source,
            )
            for (sites, module, shape, source), number in numbers.items()
        )


def _site_rows(blocks: Sequence[BlockSites], count: _Counter) -> tuple[SiteRow, ...]:
    found = [
        (group, pattern_of(projection.name), projection.shape, _input(block, group))
        for block in blocks
        for group, projection in _served(block)
    ]
    return count.rows(sorted(found, key=lambda key: SITES.index(key[0][0])))


def _served(block: BlockSites) -> Iterator[tuple[tuple[str, ...], Projection]]:
    projections = block.projections()
    return ((group, projections[group[0]]) for group in block.groups())


def _input(block: BlockSites, group: tuple[str, ...]) -> str | None:
    if group == ("o",):
        return "attention"
    if group == ("down",):
        return "neuron"
    norm = next(norm for norm, readers in block.shared_inputs() if group[0] in readers)
    return pattern_of(norm.name) if norm else None


def _weight_rows(model: nn.Module, count: _Counter) -> tuple[SiteRow, ...]:
    """Return a row for each weight matrix in the blocks of a model that relufy does not know."""
    norms = tuple(f"{norm.name}." for norm in norms_of("", model))
    return count.rows(
        ((), pattern_of(name.removesuffix(".weight")), tuple(weight.shape), None)
        for name, weight in model.named_parameters()
        if weight.ndim >= 2 and _is_in_block(name) and not f".{name}".startswith(norms)
    )


def _is_in_block(name: str) -> bool:
    return re.search(r"\.\d+\.", name) is not None


def _neurons(blocks: Sequence[BlockSites]) -> tuple[Neuron, ...]:
    numbers: defaultdict[tuple[str, str, int], int] = defaultdict(int)
    for block in blocks:
        activation = block.activation
        numbers[pattern_of(activation.name), type(activation.module).__name__, block.down.shape[1]] += 1
    return tuple(Neuron(*key, blocks=number) for key, number in numbers.items())


def _parts(model: PreTrainedModel, in_rows: int, count: _Counter) -> tuple[Part, ...]:
    """Return the parts that add up to the model; a head that is the embedding counts once, as embedding."""
    weights = dict(model.named_parameters())
    in_blocks = sum(weight.numel() for name, weight in weights.items() if _is_in_block(name))
    embedding, head = (
        _num_parameters(get) for get in (model.get_input_embeddings, model.get_output_embeddings)
    )
    is_tied = count.total < in_blocks + embedding + head
    head = 0 if is_tied else head
    return (
        count.part("weight matrices of the blocks", in_rows),
        count.part("norms and biases of the blocks", in_blocks - in_rows),
        count.part("embeddings", embedding),
        count.part("head (tied to the embeddings)" if is_tied else "head", head),
        count.part("the rest", count.total - in_blocks - embedding - head),
    )


def _num_parameters(get: Callable[[], nn.Module | None]) -> int:
    module = get()
    return sum(weight.numel() for weight in module.parameters()) if module is not None else 0


def _notes(blocks: Sequence[BlockSites]) -> Iterator[str]:
    fused: dict[str, tuple[str, ...]] = {}
    without_norm: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for block in blocks:
        fused |= {pattern_of(p.name): group for group, p in _served(block) if len(group) > 1}
        for norm, readers in block.shared_inputs():
            if norm is None:
                without_norm[readers].append(block.index)
    for module, group in fused.items():
        yield f"{' '.join(group)} are one projection, {module}: {FUSED_NOTES[group]}"
    for readers, layers in without_norm.items():
        where = "" if len(layers) == len(blocks) else f" of layer {' '.join(map(str, layers))}"
        yield (
            f"no norm makes the input of {' '.join(readers)}{where} and nothing else: "
            "no ReLU can go there (relufication's stage 2), and each projection needs a mask of its own"
        )
    if blocks and blocks[0].gate is None:
        yield "the MLP has no gate: 'neuron' and the input of 'down' are one site"


def _quantised_note(config: dict[str, Any], dtype: torch.dtype) -> Iterator[str]:
    try:
        refuse_quantized(config, "the checkpoint")
    except UserError as error:
        yield f"{error}; bytes are those of {str(dtype).removeprefix('torch.')}"
