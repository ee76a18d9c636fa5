"""From a Hugging Face checkpoint folder to one packed file, without torch.

The layout follows what can be skipped. Rows of weights are stored side by side by output where all are read
or rows are skipped; by input where the input has zeros; and `[up_i | down_i]` by neuron where
neurons are skipped.
"""

import json
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from relufy.activation_sparsity import read_activation_sparsity
from relufy.engine.packed_file import METADATA, PackedFileWriter, padded
from relufy.engine.safetensors_folder import SafetensorsFolder
from relufy.engine.spec import ACTIVATIONS, DecoderSpec, LayerSpec, decoder_spec
from relufy.errors import UserError
from relufy.hub import model_folder, read_config

SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
"""Small files of a checkpoint that travel in the packed file."""

DTYPES = ("f32",)
MAX_PARTITIONS = 16

Progress = Callable[[int, int], None]
"""Called with the tensors written so far and their total."""


def neurons_per_partition(intermediate_size: int) -> int:
    """Return the size of the fixed groups in which the MLP's neurons are claimed and summed."""
    return padded(-(-intermediate_size // MAX_PARTITIONS))


def pack(model: str | Path, output: Path | str, dtype: str = "f32", progress: Progress | None = None) -> Path:
    """Pack a checkpoint into the file `output`, atomically, and return its path.

    `model` is a folder, "bundled" or a hub id. `dtype` is the type of the stored weights ("f32"). Raises
    UserError if the checkpoint is damaged or the engine can't run such a model.
    """
    if dtype not in DTYPES:
        raise UserError(f"weights can't be packed as {dtype!r} yet; there is {', '.join(DTYPES)}")
    folder = model_folder(model)
    config = read_config(folder)
    spec = decoder_spec(config)
    weights = SafetensorsFolder(folder)
    _check_shapes(weights, spec)
    blobs = {name: (folder / name).read_bytes() for name in SIDE_FILES if (folder / name).is_file()}
    blobs[METADATA] = json.dumps(_metadata(folder, config)).encode()
    steps = list(_tensors(spec))
    with PackedFileWriter(Path(output), _numbers(spec), len(steps) + len(blobs)) as writer:
        for name, content in blobs.items():
            writer.add_blob(name, content)
        for done, add in enumerate(steps, 1):
            add(writer, weights)
            if progress:
                progress(done, len(steps))
    return Path(output)


def _metadata(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": folder.resolve().name,
        "config": config,
        "activation_sparsity": read_activation_sparsity(config).to_block(),
        "packed_by": {
            "relufy": version("relufy"),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def _numbers(spec: DecoderSpec) -> dict[str, float]:
    """Return the specification as the named numbers that csrc/decoder.cpp reads."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
    )
    numbers = {name: float(getattr(spec, name)) for name in (*names, "max_context", "norm_eps")}
    numbers["neurons_per_partition"] = neurons_per_partition(spec.intermediate_size)
    for index, layer in enumerate(spec.layers):
        prefix = f"layers.{index}."
        numbers[prefix + "activation"] = ACTIVATIONS[layer.activation]
        numbers[prefix + "shift"] = layer.shift
        numbers[prefix + "attention_input_relu"] = layer.attention_input_relu
        numbers[prefix + "mlp_input_relu"] = layer.mlp_input_relu
    return numbers


Step = Callable[[PackedFileWriter, SafetensorsFolder], None]


def _tensors(spec: DecoderSpec) -> Iterator[Step]:
    """Yield one step for each tensor of the file, in the order in which a token needs them."""
    yield _rows("embedding", "model.embed_tokens.weight")
    yield lambda writer, _: writer.add_vector("rope_frequencies", np.array(spec.rope_frequencies, np.float32))
    for index, layer in enumerate(spec.layers):
        yield from _layer_tensors(layer, f"layers.{index}.", f"model.layers.{index}.")
    yield _vector("final_norm", "model.norm.weight")
    if not spec.tied_head:
        yield _rows("head", "lm_head.weight")


def _layer_tensors(layer: LayerSpec, prefix: str, source: str) -> Iterator[Step]:
    yield _vector(prefix + "attention_norm", source + "input_layernorm.weight")
    for name in ("q", "k", "v"):
        yield _matrix(prefix + name, f"{source}self_attn.{name}_proj.weight", layer.attention_input_relu)
    yield _rows(prefix + "o", source + "self_attn.o_proj.weight")
    yield _vector(prefix + "mlp_norm", source + "post_attention_layernorm.weight")
    yield _matrix(prefix + "gate", source + "mlp.gate_proj.weight", layer.mlp_input_relu)
    up, down = source + "mlp.up_proj.weight", source + "mlp.down_proj.weight"
    if layer.has_sparse_neurons:
        yield lambda writer, weights: writer.add_bundle(
            prefix + "up_down", weights.read(up), weights.read(down)
        )
    else:
        yield _matrix(prefix + "up", up, layer.mlp_input_relu)
        yield _rows(prefix + "down", down)


def _vector(name: str, source: str) -> Step:
    return lambda writer, weights: writer.add_vector(name, weights.read(source))


def _rows(name: str, source: str) -> Step:
    return lambda writer, weights: writer.add_rows(name, weights.read(source))


def _matrix(name: str, source: str, has_sparse_input: bool) -> Step:
    if not has_sparse_input:
        return _rows(name, source)
    return lambda writer, weights: writer.add_columns(name, weights.read(source))


def _check_shapes(weights: SafetensorsFolder, spec: DecoderSpec) -> None:
    """Refuse a checkpoint whose tensors are not those of its config.json, before anything is written."""
    expected = _expected_shapes(spec)
    for name, shape in expected.items():
        if weights.shape(name) != shape:
            found = weights.shape(name)
            raise UserError(
                f"{weights.folder}: {name} has shape {list(found)}, config.json says {list(shape)}"
            )
    ignorable = {"lm_head.weight"} if spec.tied_head else set()
    unknown = [
        n for n in weights.names() if n not in expected and n not in ignorable and "rotary_emb" not in n
    ]
    if unknown:
        raise UserError(f"{weights.folder}: the engine has no place for the tensor {unknown[0]}")


def _expected_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    d, f = spec.hidden_size, spec.intermediate_size
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (spec.vocab_size, d),
        "model.norm.weight": (d,),
    }
    if not spec.tied_head:
        shapes["lm_head.weight"] = (spec.vocab_size, d)
    for index in range(spec.num_layers):
        shapes |= {
            f"model.layers.{index}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (d,),
                "post_attention_layernorm": (d,),
                "self_attn.q_proj": (queries, d),
                "self_attn.k_proj": (keys, d),
                "self_attn.v_proj": (keys, d),
                "self_attn.o_proj": (d, queries),
                "mlp.gate_proj": (f, d),
                "mlp.up_proj": (f, d),
                "mlp.down_proj": (d, f),
            }.items()
        }
    return shapes
