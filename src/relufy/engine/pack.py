"""From a Hugging Face checkpoint folder to one packed file, without torch.

The layout follows what can be skipped. Rows of weights are stored side by side by output where all are read
or rows are skipped; by input where the input has zeros; and `[up_i | down_i]` by neuron where neurons of a
gated MLP are skipped. What decides on the neurons is stored by output if they may be limited to candidates
(`for_="reuse"`, `for_="predictor"`), although its input has zeros: its rows are then what is skipped.
"""

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from relufy.activation_sparsity import read_activation_sparsity
from relufy.engine.layer_spec import LayerSpec
from relufy.engine.lora import MergedWeights, merged_weights
from relufy.engine.lora_adapter import LoraAdapter, open_adapters, side_files
from relufy.engine.packed_file import METADATA
from relufy.engine.packed_numbers import numbers, rope_tensor
from relufy.engine.packed_writer import PackedFileWriter
from relufy.engine.positions import alibi_slopes
from relufy.engine.quantize import DTYPES, INTEGER
from relufy.engine.safetensors_folder import SafetensorsFolder
from relufy.engine.source_tensors import SourceTensors
from relufy.engine.spec import DecoderSpec, decoder_spec
from relufy.errors import UserError
from relufy.fingerprint import recorded
from relufy.hub import model_folder, read_config
from relufy.schema import suggest

SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
"""Small files of a checkpoint that travel in the packed file."""

PURPOSES = ("exact", "reuse", "predictor", "dense")
"""What a file can be packed for: skipping what zeros make unnecessary; also limiting a token's neurons to
candidates; or reading every weight."""
WITH_CANDIDATES = ("reuse", "predictor")
"""The purposes whose modes limit a token's neurons to candidates."""

VECTOR_NAMES = {"threshold": "thresholds", "weight": "weight", "centre": "centre"}
"""The packed file's names for a mask's tensors."""

Progress = Callable[[int, int], None]
"""Called with the steps done so far and their total."""


def pack(
    model: str | Path,
    output: Path | str,
    dtype: str = "f32",
    for_: str = "exact",
    progress: Progress | None = None,
    lora: Sequence[str | Path] | str | Path = (),
    lora_scale: float | Sequence[float] = 1.0,
    weights: SafetensorsFolder | None = None,
) -> Path:
    """Pack a checkpoint into the file `output`, atomically, and return its path.

    `model` is a folder, "bundled" or a hub id. `dtype` is the type of the stored weights: "f32", "bf16",
    "int8" or "int4" (with embedding and head as int8). `for_` decides the layout: "exact" skips, "reuse" can
    also leave out gates, "dense" reads every weight. `lora` names folders of adapters to merge (lora.py),
    `lora_scale` one factor for all or one for each. `weights` replaces the folder's own tensors, without
    adapters. Raises UserError if the checkpoint is damaged or the engine can't run such a model, ValueError
    for `weights` with `lora`.
    """
    check_choice(dtype, for_)
    folder = model_folder(model)
    config = read_config(folder)
    spec, adapters = decoder_spec(config), open_adapters(lora, lora_scale)
    if for_ == "reuse":
        check_candidates(spec)
    if for_ == "predictor":
        check_predictor(spec)
    if weights is not None and adapters:
        raise ValueError("weights are packed as they are; lora is for a folder's own")
    tensors = weights if weights is not None else merged_weights(folder, spec, adapters)
    fingerprints = recorded(read_activation_sparsity(config).provenance)
    packer = _Packer(spec, SourceTensors(tensors, spec, fingerprints), dtype, for_)
    blobs = {name: (folder / name).read_bytes() for name in SIDE_FILES if (folder / name).is_file()}
    blobs |= side_files(adapters)
    blobs[METADATA] = json.dumps(_metadata(folder, config, adapters) | {"dtype": dtype, "for": for_}).encode()
    steps = list(packer.steps())
    num_tensors = len(blobs) + sum(step.num_tensors for step in steps)
    with PackedFileWriter(Path(output), numbers(packer.spec, for_ == "predictor"), num_tensors) as writer:
        for name, content in blobs.items():
            writer.add_blob(name, content)
        for done, step in enumerate(steps, 1):
            step.write(writer)
            if progress:
                progress(done, len(steps))
        if isinstance(tensors, MergedWeights):
            tensors.check_all_read()
    return Path(output)


def check_choice(dtype: str, for_: str) -> None:
    """Raise UserError for a type of weights or a purpose that there is not."""
    if dtype not in DTYPES:
        raise UserError(f"weights can't be packed as {dtype!r}{suggest(dtype, list(DTYPES))}")
    if for_ not in PURPOSES:
        raise UserError(f"a model can't be packed for {for_!r}{suggest(for_, list(PURPOSES))}")


def _metadata(folder: Path, config: dict[str, Any], adapters: Sequence[LoraAdapter]) -> dict[str, Any]:
    return {
        "model": folder.resolve().name,
        "lora": [adapter.provenance() for adapter in adapters],
        "config": config,
        "activation_sparsity": read_activation_sparsity(config).to_block(),
        "packed_by": {
            "relufy": version("relufy"),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def is_bundled(spec: DecoderSpec, layer: int, for_: str) -> bool:
    """Tell whether up and down of a layer lie side by side; a correction needs products of whole matrices."""
    found = spec.layers[layer]
    is_corrected = any(site in found.masks and found.masks[site].correction for site in ("up", "down"))
    return for_ != "dense" and spec.family.is_gated and found.has_sparse_neurons and not is_corrected


def is_by_input(spec: DecoderSpec, layer: int, name: str, for_: str) -> bool:
    """Tell whether a matrix outside a bundle is stored by input: whether that may have zeros."""
    found = spec.layers[layer]
    is_neuron = name == "down" and not spec.family.is_gated and found.has_sparse_neurons
    first = "gate" if spec.family.is_gated else "up"
    return (
        for_ != "dense"
        and (name in found.masks or is_neuron)
        and not (name == first and _has_candidates(found, for_))
    )


def _has_candidates(layer: LayerSpec, for_: str) -> bool:
    return for_ == "reuse" or (for_ == "predictor" and layer.predictor is not None)


def check_predictor(spec: DecoderSpec) -> None:
    """Raise UserError, with a reason, if a model has no predictor that the engine can run."""
    if not any(layer.predictor for layer in spec.layers):
        raise UserError("the model has no predictor; make one with `relufy predictor`")
    for index, layer in enumerate(spec.layers):
        corrected = [s for s in ("gate", "up", "down") if s in layer.masks and layer.masks[s].correction]
        if layer.predictor and corrected:
            raise UserError(
                f"the engine can't run this predictor: the input of {corrected[0]} has a low-rank correction "
                f"(layer {index})"
            )


def purpose_of(model: str | Path, has_candidates: bool) -> str:
    """Return what to pack a model for; "reuse" only where its layout is another than that of "exact"."""
    if not has_candidates:
        return "exact"
    spec = decoder_spec(read_config(model_folder(model)))
    first = "gate" if spec.family.is_gated else "up"
    return "reuse" if any(first in layer.masks for layer in spec.layers) else "exact"


def check_candidates(spec: DecoderSpec) -> None:
    """Raise UserError, with a reason, if a model's tokens can't be limited to candidate neurons."""
    for index, layer in enumerate(spec.layers):
        neuron = layer.masks.get("neuron")
        corrected = [s for s in ("gate", "up", "down") if s in layer.masks and layer.masks[s].correction]
        reason = None
        if not layer.has_sparse_neurons:
            reason = "its neurons have no zeros: relufy it first (relufy finetune, or sparsify with cats)"
        elif layer.deviations is not None or (neuron and neuron.function == "topk"):
            reason = "its neurons are chosen among all of them (top-k)"
        elif corrected:
            reason = f"the input of {corrected[0]} has a low-rank correction"
        if reason:
            raise UserError(f"neurons of this model can't be reused: {reason} (layer {index})")


@dataclass(frozen=True)
class _Step:
    """One thing to write, and how many tensors of the file it makes."""

    write: Callable[[PackedFileWriter], None]
    num_tensors: int = 1


@dataclass(frozen=True)
class _Packer:
    """Gives the steps that write a file, in the order in which a token needs the tensors."""

    spec: DecoderSpec
    source: SourceTensors
    dtype: str
    for_: str

    @property
    def wide_dtype(self) -> str:
        """The type of embedding and head, which four bits would hurt most for what they save."""
        return "int8" if self.dtype == "int4" else self.dtype

    @property
    def float_dtype(self) -> str:
        """The type of low-rank corrections."""
        return "f32" if self.dtype == "f32" else "bf16"

    @property
    def predictor_dtype(self) -> str:
        """The type of predictors: 4 bits would cost more candidates than they save."""
        return "int8" if self.dtype in INTEGER else self.dtype

    def steps(self) -> Iterator[_Step]:
        yield self._table("embedding", self.wide_dtype)
        yield from self._positions()
        for layer in range(self.spec.num_layers):
            yield from self._layer(layer)
        yield from self._norm("final_norm")
        if not self.spec.tied_head:
            yield self._table("head", self.wide_dtype)

    def _positions(self) -> Iterator[_Step]:
        positions = self.spec.family.positions
        if positions == "learned":
            yield self._table("position_embedding", "f32")
        elif positions == "alibi":
            slopes = alibi_slopes(self.spec.num_heads, self.spec.family.rounds_alibi)
            yield self._vector("alibi_slopes", lambda: slopes)
        for index, rope in enumerate(self.spec.ropes):
            frequencies = np.array(rope.frequencies, np.float32)
            yield self._vector(rope_tensor(index), lambda frequencies=frequencies: frequencies)

    def _layer(self, layer: int) -> Iterator[_Step]:
        has_bundle = is_bundled(self.spec, layer, self.for_)
        for norm in self.spec.norm_widths():
            yield from self._norm(norm, layer)
        for name in self.spec.matrix_shapes():
            if not has_bundle or name not in ("up", "down"):
                yield self._matrix(layer, name)
            elif name == "up":
                yield self._bundle(layer)
        for name in self.spec.matrix_shapes():
            if name in self.spec.biased or self._has_centre(layer, name):
                yield _Step(partial(self._write_bias, layer=layer, name=name))
        for site in self.spec.layers[layer].masks:
            yield from self._mask(layer, site)
        if self.for_ == "predictor" and self.spec.layers[layer].predictor:
            yield from self._predictor(layer)

    def _has_centre(self, layer: int, name: str) -> bool:
        mask = self.spec.layers[layer].masks.get(name)
        return mask is not None and "centre" in mask.per_channel

    def _norm(self, name: str, layer: int | None = None) -> Iterator[_Step]:
        prefix = "" if layer is None else f"layers.{layer}."
        yield self._vector(prefix + name, lambda: self.source.norm(name, layer)["weight"])
        if self.spec.family.norm == "layer":
            yield self._vector(f"{prefix}{name}.bias", lambda: self.source.norm(name, layer)["bias"])

    def _vector(self, name: str, read: Callable[[], np.ndarray]) -> _Step:
        return _Step(lambda writer: writer.add_vector(name, read()))

    def _table(self, name: str, dtype: str) -> _Step:
        return self._rows(name, lambda: self.source.table(name), dtype)

    def _rows(self, name: str, read: Callable[[], np.ndarray], dtype: str) -> _Step:
        return _Step(lambda writer: writer.add_rows(name, read(), dtype), 1 + (dtype in INTEGER))

    def _matrix(self, layer: int, name: str) -> _Step:
        has_sparse_input = is_by_input(self.spec, layer, name, self.for_)

        def write(writer: PackedFileWriter) -> None:
            add = writer.add_columns if has_sparse_input else writer.add_rows
            add(f"layers.{layer}.{name}", self.source.matrix(layer, name), self.dtype)

        return _Step(write, 1 + (self.dtype in INTEGER))

    def _bundle(self, layer: int) -> _Step:
        def write(writer: PackedFileWriter) -> None:
            up, down = (self.source.matrix(layer, name) for name in ("up", "down"))
            writer.add_bundle(f"layers.{layer}.up_down", up, down, self.dtype)

        return _Step(write, 1 + 2 * (self.dtype in INTEGER))

    def _mask(self, layer: int, site: str) -> Iterator[_Step]:
        mask, prefix = self.spec.layers[layer].masks[site], f"layers.{layer}.{site}."
        for name in mask.per_channel:
            yield self._vector(prefix + VECTOR_NAMES[name], partial(self.source.mask, layer, site, name))
        if mask.correction:
            for name in ("low_rank_in", "low_rank_out"):
                read = partial(self.source.mask, layer, site, name)
                yield self._rows(prefix + name, read, self.float_dtype)

    def _predictor(self, layer: int) -> Iterator[_Step]:
        prefix, is_integer = f"layers.{layer}.predictor_", self.predictor_dtype in INTEGER
        first = "gate" if self.spec.family.is_gated else "up"
        has_sparse_input = first in self.spec.layers[layer].masks

        def write_inner(writer: PackedFileWriter) -> None:
            add = writer.add_columns if has_sparse_input else writer.add_rows
            add(prefix + "in", self.source.predictor(layer, "inner"), self.predictor_dtype)

        yield _Step(write_inner, 1 + is_integer)
        yield self._rows(prefix + "out", lambda: self.source.predictor(layer, "outer"), self.predictor_dtype)
        yield _Step(partial(self._write_thresholds, layer=layer, first=first))

    def _write_thresholds(self, writer: PackedFileWriter, layer: int, first: str) -> None:
        """Write thresholds for an input less its centre c: those of the checkpoint less outer inner c."""
        prefix, thresholds = f"layers.{layer}.predictor_", self.source.predictor(layer, "threshold")
        if self._has_centre(layer, first):
            centre = self.source.mask(layer, first, "centre").astype(np.float64)
            reduced = writer.stored(prefix + "in").times(centre)
            thresholds = thresholds - writer.stored(prefix + "out").times(reduced)
        writer.add_vector(prefix + "threshold", thresholds)

    def _write_bias(self, writer: PackedFileWriter, layer: int, name: str) -> None:
        """Write a bias; an input's centre c is folded into it as W c, of the weights as they are stored."""
        outputs, _ = self.spec.matrix_shapes()[name]
        bias = np.zeros(outputs)
        if name in self.spec.biased:
            bias += self.source.bias(layer, name)
        if self._has_centre(layer, name):
            centre = self.source.mask(layer, name, "centre").astype(np.float64)
            bias += writer.stored(f"layers.{layer}.{name}").times(centre)
        writer.add_vector(f"layers.{layer}.{name}.bias", bias)
